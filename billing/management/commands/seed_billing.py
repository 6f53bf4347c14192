from typing import Any

from django.core.management.base import BaseCommand

from billing import catalogue
from billing.catalogue import packages, system_settings
from billing.ledger import welcome


class Command(BaseCommand):
    help = "Write the default settings, packages and AI models that are missing. Safe to repeat; edits stay."

    def handle(self, *args: Any, **options: Any) -> None:
        system_settings.initialize_default_settings()
        new_packages = packages.seed_default_packages()
        new_models = catalogue.seed_default_models()
        welcome.read_key()  # a SECRET_KEY that is new gets its copy while the old one is still there
        self.stdout.write(f"Settings are there; {new_packages} packages and {new_models} models were added.")
