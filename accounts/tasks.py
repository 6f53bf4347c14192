"""What Celery runs for accounts/. Each task calls one domain function and may be delivered twice."""

from celery import shared_task

from accounts import teams


@shared_task
def send_invitations() -> int:
    return teams.send_invitations()
