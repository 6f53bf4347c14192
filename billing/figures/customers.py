"""Who came when and what they spent since, and what of each package was sold. Pure reads."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from billing.figures.sums import rows_of
from billing.usage import stats


@dataclass(frozen=True, slots=True)
class Cohort:
    """The accounts that were opened in one month, or what of it is in the span."""

    since: datetime
    until: datetime
    accounts: int
    paying: int  # bought at least once
    auto_recharging: int  # have it switched on now
    used_tokens: int  # until now
    median_days_to_pay: int | None  # from opening the account to the first purchase, of those that paid
    # (number of the span in which it was paid, from 0; currency): cents after discounts and refunds.
    spent_cents: Mapping[tuple[int, str], int]

    @property
    def lifetime_cents(self) -> dict[str, int]:
        """All that its accounts have spent until now, by currency, in cents."""
        total: dict[str, int] = defaultdict(int)
        for (_, currency), cents in self.spent_cents.items():
            total[currency] += cents
        return dict(total)

    @property
    def conversion_permille(self) -> int | None:
        """Of 1,000 accounts, those that bought at least once."""
        return self.paying * 1_000 // self.accounts if self.accounts else None

    def lifetime_value_cents(self, currency: str) -> int | None:
        """What an account has brought until now, on average, in cents of one currency, rounded down."""
        return self.lifetime_cents.get(currency, 0) // self.accounts if self.accounts else None


_COHORTS = """
SELECT width_bucket(account.created_at, %(edges)s::timestamptz[]) - 1, count(*),
       count(first_paid_at), count(*) FILTER (WHERE auto_recharge_enabled), sum(lifetime_used_tokens)::bigint,
       percentile_disc(0.5) WITHIN GROUP (ORDER BY first_paid_at - account.created_at)
  FROM billing_tokenaccount AS account
  LEFT JOIN (
    SELECT account_id, min(created_at) AS first_paid_at FROM billing_tokentransaction
     WHERE type <> 'usage' AND type IN ('purchase', 'auto_recharge') GROUP BY account_id
  ) AS paid ON paid.account_id = account.id
 WHERE account.created_at >= %(since)s AND account.created_at < %(until)s
 GROUP BY 1 ORDER BY 1"""
_COHORTS_SPENT = """
SELECT width_bucket(account.created_at, %(edges)s::timestamptz[]) - 1,
       width_bucket(entry.created_at, %(edges)s::timestamptz[]) - 1, entry.currency, sum(paid_cents)::bigint
  FROM billing_tokentransaction AS entry
  JOIN billing_tokenaccount AS account ON account.id = entry.account_id
 WHERE entry.type <> 'usage' AND entry.type IN ('purchase', 'auto_recharge', 'refund')
   AND account.created_at >= %(since)s AND account.created_at < %(until)s
 GROUP BY 1, 2, 3"""


def get_cohorts(*, since: datetime, until: datetime) -> list[Cohort]:
    """Accounts by the month they were opened in (in the time zone of `since`), and what they have spent since then.

    What was paid after `until` counts in the span after the last.
    """
    edges = stats.time_edges(since=since, until=until.astimezone(since.tzinfo), bucket="month")
    parameters = {"edges": edges, "since": since, "until": until}
    spent: dict[int, dict[tuple[int, str], int]] = defaultdict(dict)
    for cohort, paid_in, currency, cents in rows_of(_COHORTS_SPENT, parameters):
        spent[cohort][paid_in, currency] = cents
    return [
        Cohort(
            since=edges[number],
            until=edges[number + 1],
            accounts=accounts,
            paying=paying,
            auto_recharging=auto_recharging,
            used_tokens=used_tokens,
            median_days_to_pay=None if delay is None else delay.days,
            spent_cents=spent[number],
        )
        for number, accounts, paying, auto_recharging, used_tokens, delay in rows_of(_COHORTS, parameters)
    ]


@dataclass(frozen=True, slots=True)
class PackageSales:
    """What a package sold for one currency in a span."""

    package_name: str
    currency: str
    sales: int
    tokens: int
    paid_cents: int  # after discounts, before refunds, without tax
    discount_cents: int
    auto_recharges: int  # of the sales
    buyers: int

    @property
    def average_cents(self) -> int:
        return self.paid_cents // self.sales


_PACKAGE_SALES = """
SELECT package_name, entry.currency, count(*), sum(entry.amount)::bigint, sum(paid_cents)::bigint,
       sum(discount_cents)::bigint, count(*) FILTER (WHERE entry.type = 'auto_recharge'),
       count(DISTINCT entry.account_id)
  FROM billing_tokentransaction AS entry
  JOIN billing_purchase AS purchase ON purchase.id = entry.purchase_id
 WHERE entry.type <> 'usage' AND entry.type IN ('purchase', 'auto_recharge')
   AND entry.created_at >= %(since)s AND entry.created_at < %(until)s
 GROUP BY 1, 2 ORDER BY 5 DESC, 1, 2"""


def get_package_sales(*, since: datetime, until: datetime) -> list[PackageSales]:
    """What was sold in the span, by package (its name when it was bought) and currency, most money first."""
    return [PackageSales(*row) for row in rows_of(_PACKAGE_SALES, {"since": since, "until": until})]
