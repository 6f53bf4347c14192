"""The HTTP API: for the platform's other servers, which share a secret, and for people with a personal API key.

Amounts are whole tokens. Every error is an `application/problem+json` document with a `code` for programs and
a `detail` for people. What can be retried carries an `Idempotency-Key`: a retry answers what the first did.
"""
