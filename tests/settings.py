"""The product's settings, for tests: the same password hash, without the time and memory that it is made to cost."""

from django.contrib.auth.hashers import Argon2PasswordHasher

from postmate.settings import *  # noqa: F403


class CheapArgon2PasswordHasher(Argon2PasswordHasher):
    time_cost, memory_cost, parallelism = 1, 8, 1


PASSWORD_HASHERS = ["tests.settings.CheapArgon2PasswordHasher"]

WHITENOISE_MAX_AGE = 3600  # a browser asks once for each file, as in production
