#!/bin/sh
# Makes the files in secrets/ that docker-compose.yml names, and none anew. What only you can know, it asks you to write.
set -eu
cd "$(dirname "$0")/.."
mkdir -p secrets
# The directory is closed; the files are not, since the processes in the containers are not their owner.
chmod 700 secrets
umask 022

random() {
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n'
}

for name in secret_key billing_secret metrics_token postgres_password; do
    test -s "secrets/$name" || random >"secrets/$name"
done
test -s secrets/database_url ||
    printf 'postgresql://postmate:%s@db:5432/postmate' "$(cat secrets/postgres_password)" >secrets/database_url

missing=0
for name in stripe_secret_key stripe_webhook_secret email_url; do
    test -s "secrets/$name" && continue
    : >"secrets/$name"
    echo "Write one line into secrets/$name"
    missing=1
done
for name in openai_api_key anthropic_api_key google_api_key; do
    test -e "secrets/$name" || : >"secrets/$name"
done
# An empty file is no key.
if ! { test -s secrets/openai_api_key || test -s secrets/anthropic_api_key || test -s secrets/google_api_key; }; then
    echo "Write your key into secrets/openai_api_key, secrets/anthropic_api_key or secrets/google_api_key; one is enough"
    missing=1
fi
if [ "$missing" = 1 ]; then
    echo "docs/TOKEN_BILLING_SETUP.md says where they come from. Then: docker compose up -d"
fi
