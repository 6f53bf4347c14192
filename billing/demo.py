"""The people that `manage.py seed_demo` makes on a developer's machine."""

DEMO_PASSWORD = "demo-tokens"  # noqa: S105 – opens nothing but a demonstration
DEMO_PEOPLE = {
    "user@postmate.example": "user",
    "admin@postmate.example": "admin",
    "superadmin@postmate.example": "superadmin",
}
DEMO_NAMES = {
    "user@postmate.example": "Nora Lindberg",
    "admin@postmate.example": "Tom Becker",
    "superadmin@postmate.example": "Grace Okafor",
}
