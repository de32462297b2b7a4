#!/bin/bash
# Process 1 of the namespaces that play the login node: a bridge for the nodes' network, munged and slurmctld.
# Whoever ends it ends every node and every job with it.
#   controller.sh FOLDER
set -euo pipefail
folder=$1

mount --make-rprivate /
hostname login
ip link set lo up
ip link add bridge0 type bridge
ip addr add 10.77.0.1/24 dev bridge0
ip link set bridge0 up
mount --bind "$folder/hosts" /etc/hosts

munged --force --key-file "$folder/munge.key" --socket "$folder/munge/munge.socket" --seed-file "$folder/munge/seed" \
    --pid-file "$folder/munge/munged.pid" --log-file "$folder/log/munged.log"
slurmctld -c -f "$folder/slurm.conf"

sleep infinity &
wait # and while it waits, bash buries every orphan of this process space
