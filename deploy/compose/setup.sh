#!/bin/sh
# Fills the volumes before the coordinator and the clients start. What an earlier start left there is kept, so that `up` can be repeated.
set -eu
home=/etc/choral # the coordinator's: configuration, keys, test set
# /shards/NAME and /tokens/NAME: two volumes of client NAME.

if [ ! -e "$home/ca.pem" ]; then
    choral server init /tmp/init --host coordinator
    cp /tmp/init/ca.key /tmp/init/server.key /tmp/init/server.pem "$home"
    cp /tmp/init/ca.pem "$home" # last: it says that all of them are there
fi
cd /shards
set --
for client in *; do set -- "$@" --client "$client"; done
choral shards boston_housing --out /tmp/shards "$@"
for client in *; do cp "/tmp/shards/$client/shard.csv" "$client"; done
cp /tmp/shards/test.csv "$home"

cp /compose/choral.yaml "$home"
chown -R choral: "$home" /tokens/*
