"""Which mailbox an address leads to, and which are thrown away (row 132)."""

import pytest
from pytest_django.fixtures import Settings

from accounts.mailboxes import canonical, is_disposable

ONE_MAILBOX = [
    # Case, quotes, Unicode's forms, the two spellings of a domain: everywhere.
    ("nora@example.com", "NORA@Example.COM", '"nora"@example.com', "ｎｏｒａ@ｅｘａｍｐｌｅ．ｃｏｍ",
     "nora@example.com."),
    ("nora@bücher.example", "nora@BÜCHER.example", "nora@xn--bcher-kva.example", "nora@XN--BCHER-KVA.example",
     "nora@bu\u0308cher.example"),
    ("zoë@пример.рф", "ZOE\u0308@xn--e1afmkfd.xn--p1ai", "zoë+x@Пример.РФ"),
    # "+" and what follows: everywhere, too.
    ("nora@example.com", "nora+1@example.com", "Nora+a+b@example.com", '"nora+x"@example.com'),
    ("nora@outlook.com", "nora+shop@outlook.com"), ("nora@hotmail.co.uk", "nora+shop@hotmail.co.uk"),
    # By the provider.
    ("johndoe@gmail.com", "John.Doe+x@gmail.com", "j.o.h.n.d.o.e@googlemail.com", '"john.doe"@GMAIL.com'),
    ("nora.b@icloud.com", "nora.b+x@me.com", "Nora.B@mac.com"),
    ("john_doe@proton.me", "john.doe@pm.me", "JohnDoe+x@protonmail.com", "john-doe@protonmail.ch"),
    ("nick-shop@yahoo.com", "nick-bank@yahoo.com", "nick+x@yahoo.com"),
    ("nora.b@ya.ru", "nora-b@yandex.ru", "nora-b+x@yandex.com"),
    ("john_doe@fastmail.com", "shop@john-doe.fastmail.com", "john_doe+x@fastmail.com"),
    ("nora@sent.com", "anything@nora.sent.com", "x@more.nora.sent.com"),
]  # fmt: skip

OTHERS = [
    ("john.doe@example.com", "johndoe@example.com"),  # dots count unless the provider says otherwise
    ("john.doe@outlook.com", "johndoe@outlook.com"),
    ("john-doe@example.com", "john@example.com"),
    ("nora@example.com", "nora@example.org"),
    ("nora@mail.example.com", "nora@example.com"),
    ("nora@outlook.com", "nora@hotmail.com"),  # mailboxes of two people
    ("nora@yahoo.com", "nora@yahoo.co.uk"),
    ("nora@fastmail.com", "nora@fastmail.fm"),
    ("+1@example.com", "+2@example.com"),
    ("straße@example.com", "strase@example.com"),
    ("nora@straße.example", "nora@strasse.example"),
    ("root@[127.0.0.1]", "root@[127.0.0.2]"),
]


def test_one_mailbox_has_one_spelling() -> None:
    for spellings in ONE_MAILBOX:
        assert len({canonical(spelling) for spelling in spellings}) == 1, [canonical(each) for each in spellings]
        assert canonical(canonical(spellings[0])) == canonical(spellings[0])
    for one, other in OTHERS:
        assert canonical(one) != canonical(other)


@pytest.mark.parametrize("address", ["", "@", "nora", "@example.com", "nora@", "..@gmail.com", "nora@xn--", "a@\ud800"])
def test_what_is_no_address_is_no_error(address: str) -> None:
    """No form lets them in; rows of elsewhere may hold them."""
    canonical(address)
    is_disposable(address)


def test_disposable(settings: Settings) -> None:
    settings.DISPOSABLE_EMAIL_DOMAINS = ["BÜCHER.example", "throw.example"]
    disposable = (
        "a@mailinator.com", "a@MAILINATOR.COM", "a@deep.down.mailinator.com", "a@yopmail.com", "a@duck.com",
        "shop@nora.33mail.com", "a@xn--bcher-kva.example", "a@throw.example", "a@sub.throw.example",
    )  # fmt: skip
    for address in disposable:
        assert is_disposable(address), address
    for address in ("a@gmail.com", "a@example.com", "a@notthrow.example", "mailinator.com@example.com", "a@com"):
        assert not is_disposable(address), address
