#!/bin/sh
# Fills the volumes before the coordinator and the clients start. What an earlier start left there is kept, so that `up` can be repeated.
set -eu
home=/etc/choral       # the coordinator's: configuration, keys, test set
state=/var/lib/choral  # the coordinator's: runs
# /trust: what clients know about the coordinator. /shards/NAME: the volume of client NAME.

if [ ! -e "$home/ca.pem" ]; then
    choral server init /tmp/init --host coordinator
    cp /tmp/init/ca.key /tmp/init/server.key /tmp/init/server.pem "$home"
    cp /tmp/init/ca.pem "$home" # last: it says that all of them are there
fi
cp "$home/ca.pem" /trust

cd /shards
set --
for client in *; do set -- "$@" --client "$client"; done
choral shards boston_housing --out /tmp/shards "$@"
for client in *; do cp "/tmp/shards/$client/shard.csv" "$client"; done
cp /tmp/shards/test.csv "$home"

# A run that was interrupted goes on; after one that is over, another begins.
run=boston number=1
while grep -Eqs '"state": "(finished|stopped)"' "$state/runs/$run/run.json"; do
    number=$((number + 1))
    run=boston-$number
done
sed "s/^  name: boston\$/  name: $run/" /compose/choral.yaml > "$home/choral.yaml"
chown -R choral: "$home"
