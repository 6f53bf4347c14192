FROM python:3.11-slim AS build
WORKDIR /app
RUN python -m venv /venv
COPY requirements/production.txt requirements/
RUN /venv/bin/pip install --no-cache-dir --require-hashes -r requirements/production.txt
COPY . .
# Settings insist on production's variables; collecting files uses none of them.
RUN env DEBUG=false SECRET_KEY=build SITE_URL=https://build DATABASE_URL=postgresql:///build REDIS_URL=redis://build \
    EMAIL_URL=dummymail:// STRIPE_SECRET_KEY=build STRIPE_WEBHOOK_SECRET=build OPENAI_API_KEY=build \
    /venv/bin/python manage.py collectstatic --noinput

FROM python:3.11-slim
RUN useradd --system --create-home postmate && install --directory --owner postmate /media
COPY --from=build /venv /venv
COPY --from=build /app /app
WORKDIR /app
USER postmate
ENV DEBUG=false PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
CMD ["granian", "--interface", "wsgi", "--host", "0.0.0.0", "--port", "8000", "--workers", "2", \
     "--blocking-threads", "8", "postmate.wsgi:application"]
