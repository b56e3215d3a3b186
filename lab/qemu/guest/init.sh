#!/bin/busybox sh
# The guest's first process: loads modules, runs the workloads that the kernel command line names
# (ferry.workload=NAME[,NAME...]) and reports on ttyS1. What is said there: lab/qemu/report.py.
export PATH=/sbin:/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tracefs tracefs /sys/kernel/tracing
exec </dev/null >/dev/console 2>&1
. /lib/ferry.sh

stty -F "$REPORT" raw -echo
: > /run/errors
echo "FERRY boot"
report boot kernel="$(uname -r)"

while read -r module; do
    insmod "/lib/modules/$module" || error module "$module"
done < /lib/modules/order

# Only what happens from here on is judged.
dmesg -c > /run/dmesg.boot

# The host ends the load with a line `stop`.
while read -r line; do
    [ "$line" = stop ] && : > "$STOP"
done < "$REPORT" &
listener=$!

beat() {
    n=0
    while :; do
        reads=0 writes=0 inflight=0
        for statistics in /sys/block/vd*/stat /sys/block/nvme*/stat; do
            [ -e "$statistics" ] || continue
            read -r r _ _ _ w _ _ _ f _ < "$statistics"
            reads=$((reads + r)) writes=$((writes + w)) inflight=$((inflight + f))
        done
        n=$((n + 1))
        report beat n=$n reads=$reads writes=$writes inflight=$inflight
        sleep 0.2
    done
}
beat &
beating=$!

report ready
running=
for workload in $(option workload idle | tr , ' '); do
    if [ -f "/workloads/$workload" ]; then
        sh "/workloads/$workload" &
        running="$running $!"
    else
        error workload "$workload"
    fi
done
wait $running

kill $beating $listener
dmesg > /run/dmesg.load
seen() { grep -ciE "$1" /run/dmesg.load; }
report dmesg \
    io_error="$(seen 'I/O error|critical (target|medium) error|EXT4-fs error')" \
    reset="$(seen '\breset')" \
    hung="$(seen 'blocked for more than|hung|soft lockup|stall')" \
    warning="$(seen 'WARNING|BUG:|Oops|Call Trace')" \
    interrupt="$(seen 'nobody cared|spurious|No irq handler')" \
    network="$(seen 'Unit Hang|NETDEV WATCHDOG|transmit queue.*timed out|Link is Down')" \
    lines="$(wc -l < /run/dmesg.load)"
report end errors="$(wc -l < /run/errors)"
echo "FERRY end"
[ "$(option poweroff 1)" = 1 ] && poweroff -f
while :; do sleep 3600; done
