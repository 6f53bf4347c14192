"""Which mailbox an e-mail address leads to, and which addresses are made to be thrown away.

For what each person may have once. Mail is always sent to the address as its owner wrote it.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import idna
from disposable_email_domains import blocklist
from django.conf import settings


@dataclass(frozen=True, slots=True)
class Rules:
    """How a provider reads the part before the "@", beyond what holds for all: case, and "+" with what follows."""

    ignored: str = ""  # characters that make no difference
    same: tuple[str, str] = ("", "")  # the first counts as the second
    separator: str = ""  # begins a suffix, like "+"


GMAIL = Rules(ignored=".")  # support.google.com/mail/answer/7436150; in the domains of Workspace dots count
PROTON = Rules(ignored=".-_")  # proton.me/support/change-username: they are "transparent"
YAHOO = Rules(separator="-")  # its "disposable addresses" are nickname-keyword@; no other name has a hyphen
YANDEX = Rules(same=("-", "."))  # a login may be written with the one or the other
FASTMAIL = Rules(same=("-", "_"))  # fastmail.help, 360060591053: what a domain cannot spell is written with a hyphen

# Domains that lead to the same mailboxes, the first of them for all. Also dev.maxmind.com/minfraud, "Normalizing Email
# Addresses", and usercheck.com/guides/how-to-normalize-email-addresses.
TWINS = (
    ("gmail.com", "googlemail.com"),
    ("icloud.com", "me.com", "mac.com"),
    ("proton.me", "protonmail.com", "protonmail.ch", "pm.me"),  # proton.me/support/addresses-and-aliases
    (  # yandex.com/support/domain/additional/mailbox-alias.xml
        "yandex.ru", "ya.ru", "yandex.com", "yandex.by", "yandex.kz", "yandex.ua", "yandex.com.tr", "yandex.uz",
        "narod.ru",
    ),
)  # fmt: skip
_FIRST_TWIN = {domain: twins[0] for twins in TWINS for domain in twins}

# Each of its domains has mailboxes of its own, which receive what is sent to anything@name.domain as well.
_FASTMAIL_DOMAINS = """
    123mail.org 150mail.com 150ml.com 16mail.com 2-mail.com 4email.net 50mail.com airpost.net allmail.net cluemail.com
    elitemail.org emailcorner.net emailengine.net emailengine.org emailgroups.net emailplus.org emailuser.net eml.cc
    f-m.fm fast-email.com fast-mail.org fastem.com fastemailer.com fastest.cc fastimap.com fastmail.cn fastmail.co.uk
    fastmail.com fastmail.com.au fastmail.de fastmail.es fastmail.fm fastmail.fr fastmail.im fastmail.in fastmail.jp
    fastmail.mx fastmail.net fastmail.nl fastmail.org fastmail.se fastmail.to fastmail.tw fastmail.uk fastmail.us
    fastmailbox.net fastmessaging.com fea.st fmail.co.uk fmailbox.com fmgirl.com fmguy.com ftml.net hailmail.net
    imap-mail.com imap.cc imapmail.org inoutbox.com internet-e-mail.com internet-mail.org internetemails.net
    internetmailing.net jetemail.net justemail.net letterboxes.org mail-central.com mail-page.com mailas.com
    mailbolt.com mailc.net mailcan.com mailforce.net mailhaven.com mailingaddress.org mailite.com mailmight.com
    mailnew.com mailsent.net mailservice.ms mailup.net mailworks.org ml1.net mm.st myfastmail.com mymacmail.com
    nospammail.net ownmail.net petml.com postinbox.com postpro.net proinbox.com promessage.com realemail.net
    reallyfast.biz reallyfast.info rushpost.com sent.as sent.at sent.com speedpost.net speedymail.org ssl-mail.com
    swift-mail.com the-fastest.net the-quickest.com theinternetemail.com veryfast.biz veryspeedy.net warpmail.net
    xsmail.com yepmail.net your-mail.com
"""
FASTMAIL_DOMAINS = frozenset(_FASTMAIL_DOMAINS.split())

# Masks: they forward to one mailbox, and its owner has as many of them as they like.
_MASKS = """
    33mail.com 8alias.com 8shield.net addy.io addymail.com aleeas.com anonaddy.com anonaddy.me dralias.com duck.com
    mozmail.com passinbox.com passmail.com passmail.net privaterelay.appleid.com silomails.com simplelogin.co
    simplelogin.com simplelogin.fr slmail.me slmails.com
"""
MASKS = frozenset(_MASKS.split())


def canonical(address: str) -> str:
    """The one spelling of all addresses that lead to the same mailbox, as far as its provider says so.

    Everywhere: case, Unicode's forms, quotes that need not be, a domain's two spellings, and "+" with what follows:
    most servers deliver that so, and two people of whom one is called like the other with a "+" are rarer than one
    person who tries. Dots, hyphens and twin domains count as one for the providers above alone.
    """
    local, _, domain = address.strip().rpartition("@")
    local, domain = unicodedata.normalize("NFKC", _unquoted(local)).casefold(), canonical_domain(domain)
    for parent in _parents(domain):
        if parent in FASTMAIL_DOMAINS and parent != domain:
            local, domain = domain.removesuffix(f".{parent}").rpartition(".")[2], parent
    domain = _FIRST_TWIN.get(domain, domain)
    rules = _rules_of(domain)
    for separator in ("+", rules.separator):
        if separator:
            local = local.partition(separator)[0] or local
    bare = local.translate(str.maketrans("", "", rules.ignored)) or local
    return f"{bare.replace(*rules.same) if rules.same[0] else bare}@{domain}"


def is_disposable(address: str) -> bool:
    """Whether the address belongs to a service that hands out as many as anyone wants: throw-away mailboxes (the list
    of the package, and DISPOSABLE_EMAIL_DOMAINS) and masks. Their subdomains count, too."""
    own = {canonical_domain(domain) for domain in settings.DISPOSABLE_EMAIL_DOMAINS}
    domain = canonical_domain(address.rpartition("@")[2])
    return any(parent in blocklist or parent in MASKS or parent in own for parent in _parents(domain))


@lru_cache(10_000)
def canonical_domain(domain: str) -> str:
    """In lower case and ASCII (punycode), whichever way it was written."""
    try:
        domain = idna.uts46_remap(domain, std3_rules=False)
    except idna.IDNAError:  # of no script that domains are written in
        domain = unicodedata.normalize("NFKC", domain).casefold()
    return ".".join(_ascii(label) for label in domain.strip(".").split("."))


def _ascii(label: str) -> str:
    try:
        return idna.encode(label, uts46=True).decode()
    except idna.IDNAError:  # an address of numbers, in brackets; what no registry sells
        return label.lower()


def _unquoted(local: str) -> str:
    """`"john.doe"` is john.doe: quotes allow more characters, and change nothing."""
    if len(local) > 2 and local[0] == local[-1] == '"':
        return re.sub(r"\\(.)", r"\1", local[1:-1])
    return local


def _parents(domain: str) -> list[str]:
    """The domain and those above it, without the topmost."""
    labels = domain.split(".")
    return [".".join(labels[position:]) for position in range(max(1, len(labels) - 1))]


def _rules_of(domain: str) -> Rules:
    if domain in FASTMAIL_DOMAINS:
        return FASTMAIL
    if domain.startswith("yahoo.") or domain in ("ymail.com", "rocketmail.com", "myyahoo.com"):
        return YAHOO
    return {"gmail.com": GMAIL, "proton.me": PROTON, "yandex.ru": YANDEX}.get(domain, Rules())
