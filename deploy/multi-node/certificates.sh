#!/bin/sh
# Makes the certificates of this example, with an authority of its own, and the engines' token:
#
#   sh certificates.sh DIRECTORY engines.internal
#
# A second run renews the certificates and keeps authority and token; processes that run take them without a restart.
# Keep authority-key.pem off the machines that serve. Whoever has an authority already uses that instead.
set -eu
[ $# -eq 2 ] || { echo "usage: $0 DIRECTORY NAME_OF_THE_ENGINES" >&2; exit 2; }
mkdir -p "$1"
cd "$1"
umask 077
days=90

if [ ! -e authority-key.pem ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj "/CN=engines' authority" \
        -addext basicConstraints=critical,CA:TRUE,pathlen:0 -addext keyUsage=critical,keyCertSign,cRLSign \
        -keyout authority-key.pem -out authority.pem
fi

issue() { # NAME USAGE SUBJECT_ALTERNATIVE_NAME
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$1" -keyout "$1-key.new" -out "$1.csr"
    printf 'basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=%s\nsubjectAltName=%s\n' \
        "$2" "$3" > "$1.ext"
    openssl x509 -req -in "$1.csr" -CA authority.pem -CAkey authority-key.pem -CAcreateserial -days "$days" -sha256 \
        -extfile "$1.ext" -out "$1-cert.new"
    mv "$1-key.new" "$1-key.pem"
    mv "$1-cert.new" "$1-cert.pem"
    rm "$1.csr" "$1.ext"
}

issue engine serverAuth "DNS:$2"
issue front clientAuth "DNS:front"
[ -e token ] || openssl rand -base64 32 > token
