from django.apps import AppConfig


class PostmateConfig(AppConfig):
    name = "postmate"

    def ready(self) -> None:
        from postmate.ops import checks  # noqa: F401 – importing it registers the checks
