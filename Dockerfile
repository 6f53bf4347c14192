FROM python:3.11-slim-trixie AS build
WORKDIR /app
RUN python -m venv /venv
COPY requirements/production.txt requirements/
RUN /venv/bin/pip install --no-cache-dir --require-hashes -r requirements/production.txt
COPY . .
# Settings insist on production's variables; collecting files uses none of them.
RUN env DEBUG=false SECRET_KEY=build SITE_URL=https://build DATABASE_URL=postgresql:///build REDIS_URL=redis://build \
    EMAIL_URL=dummymail:// STRIPE_SECRET_KEY=build STRIPE_WEBHOOK_SECRET=build OPENAI_API_KEY=build \
    /venv/bin/python manage.py collectstatic --noinput

FROM python:3.11-slim-trixie
# pg_dump and pg_restore, for backups: Debian's are of the major version that docker-compose.yml runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends postgresql-client-17 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --create-home postmate \
    && install --directory --owner postmate /media /backups
COPY --from=build /venv /venv
COPY --from=build /app /app
WORKDIR /app
USER 10001
ENV DEBUG=false PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
CMD ["python", "-m", "postmate.serving", "web", "--host", "0.0.0.0", "--port", "8000", "--workers", "2"]
