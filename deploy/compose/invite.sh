#!/bin/sh
# Makes a token for each client that has none yet. With it a client enrols when it starts for the first time; then it is used up.
set -eu
umask 077
cd /tokens
for client in *; do
    [ ! -e "$client/token" ] || continue
    attempts=0
    until choral server token "$client" --replace --expires 1d --config /etc/choral/choral.yaml >/tmp/token 2>/tmp/reason; do
        attempts=$((attempts + 1))
        if [ "$attempts" -ge 120 ]; then cat /tmp/reason >&2; exit 1; fi
        sleep 0.5
    done
    cp /tmp/token "$client/.token"
    mv "$client/.token" "$client/token"
done
