#!/bin/sh
# Draws what compose.yaml asks for into secrets/ beside it, or into the folder given, once: what is there stays.
# The files are their owner's alone. The containers read them as user 1000: run this as that user, or give them to it.
set -eu
umask 077
folder=${1:-$(dirname "$0")/secrets}
mkdir -p "$folder"
folder=$(cd "$folder" > /dev/null && pwd)

draw() {
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n'
}

test -e "$folder/ray_token" || draw > "$folder/ray_token"
test -e "$folder/postgres" || draw > "$folder/postgres"
if ! test -e "$folder/aws"; then
    secret=$(draw)
    printf '[default]\naws_access_key_id = mm\naws_secret_access_key = %s\n' "$secret" > "$folder/aws"
    printf '{"identities": [{"name": "mm", "credentials": [{"accessKey": "mm", "secretKey": "%s"}], "actions": ["Admin"]}]}\n' "$secret" > "$folder/s3.json"
fi
echo "$folder holds the secrets; a client of the cluster names the token: export RAY_AUTH_TOKEN_PATH=$folder/ray_token"
