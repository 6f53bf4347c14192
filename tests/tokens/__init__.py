"""How our count of tokens fares: no part of the tests, but run beside them (`make bench-tokens`)."""
