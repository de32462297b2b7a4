#!/bin/bash
# Process 1 of the namespaces that play one node: an address, a /tmp and a /dev/shm of its own, and slurmd.
#   node.sh FOLDER NAME ADDRESS SHARED_FOLDER...
set -euo pipefail
folder=$1 name=$2 address=$3
shift 3

mount --make-rprivate /
hostname "$name"
for _ in $(seq 250); do # the other end of the cable is plugged in from outside
    ip link show eth0 >/dev/null 2>&1 && break
    sleep 0.02
done
ip link set lo up
ip addr add "$address/24" dev eth0
ip link set eth0 up
mount --bind "$folder/hosts" /etc/hosts

# The shared folders are bound into the node's own /tmp first: once that lies over the old one, they are out of sight.
own_tmp=$folder/nodes/$name/tmp
for shared in "$@"; do
    case $shared in /tmp/*)
        mkdir -p "$own_tmp${shared#/tmp}"
        mount --bind "$shared" "$own_tmp${shared#/tmp}"
        ;;
    esac
done
mount --rbind "$own_tmp" /tmp
mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm

slurmd -D -f "$folder/slurm.conf" -N "$name" >"$folder/log/slurmd.$name.out" 2>&1 &
sleep infinity &
wait %2 # not for slurmd: a node whose slurmd dies is still a node
