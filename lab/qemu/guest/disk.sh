# Load for block devices: on each disk direct I/O by several jobs at once in its upper half and a
# file system in its lower half, everything checked against checksums.
#   ferry.disk=vda[,vdb...]  ferry.workers=4 (direct I/O jobs)  ferry.passes=0 (0: until `stop`)
. /lib/ferry.sh

workers=$(option workers 4)
passes=$(option passes 0)
STRIPE_KIB=512
MINIMUM_HALF_KIB=8192
DEPTH_WINDOW_S=2
trace=/sys/kernel/tracing/events/block

again() { ! stopped && { [ "$passes" -eq 0 ] || [ "$1" -lt "$passes" ]; }; }

# Writes new content and reads it back, both past the page cache: stale data in either direction
# cannot have the right checksum.
direct() {
    data=/run/$name.direct.$1
    n=0
    while again $n; do
        case $((n % 3)) in
            0) block_kib=4 ;;
            1) block_kib=16 ;;
            2) block_kib=128 ;;
        esac
        count=$((STRIPE_KIB / block_kib))
        at=$(((half_kib + $1 * STRIPE_KIB) / block_kib))
        n=$((n + 1))
        dd if=/dev/urandom of="$data" bs=4k count=$((STRIPE_KIB / 4)) status=none
        dd if="$data" of="/dev/$name" bs=${block_kib}k seek=$at oflag=direct conv=notrunc \
            status=none || error direct-write "$name-job-$1"
        read_back=$(dd if="/dev/$name" bs=${block_kib}k skip=$at count=$count iflag=direct \
            status=none | checksum)
        [ "$read_back" = "$(checksum < "$data")" ] || error direct-checksum "$name-job-$1"
    done
    report job what=direct disk="$name" passes=$n
}

# Files written with fsync, renamed over the last ones, read back past the page cache.
synced() {
    data=/run/$name.synced
    n=0
    while again $n; do
        n=$((n + 1))
        dd if=/dev/urandom of="$data" bs=4k count=64 status=none
        dd if="$data" of="$folder/new" bs=16k conv=fsync status=none || error fsync "$name-pass-$n"
        mv "$folder/new" "$folder/synced" && sync
        read_back=$(dd if="$folder/synced" bs=64k iflag=direct status=none | checksum)
        [ "$read_back" = "$(checksum < "$data")" ] || error file-checksum "$name-pass-$n"
    done
    report job what=synced disk="$name" passes=$n
}

# Pages that the device filled lie in the page cache for a while and are then read from there:
# what a migration must not lose although no I/O touches them any more.
cached() {
    n=0
    while again $n; do
        n=$((n + 1))
        echo 1 > /proc/sys/vm/drop_caches
        (cd "$folder/kept" && sha256sum -c -s "/run/$name.sums") ||
            error read-checksum "$name-pass-$n"
        sleep 0.3
        (cd "$folder/kept" && sha256sum -c -s "/run/$name.sums") ||
            error cache-checksum "$name-pass-$n"
    done
    report job what=cached disk="$name" passes=$n
}

# Lists the requests of the load's beginning one by one, to see how many were in flight at once.
# The buffer holds all of that time, since a list that lost some would tell nothing.
depth() {
    echo 1 > $trace/block_rq_issue/enable && echo 1 > $trace/block_rq_complete/enable || return
    sleep $DEPTH_WINDOW_S
    echo 0 > $trace/enable
    awk '/block_rq_issue:/ { if (++now > most) most = now }
        /block_rq_complete:/ && now { now-- }
        END { print most + 0 }' /sys/kernel/tracing/trace > /run/depth
}

load() {
    name=$1
    folder=/mnt/$name
    tries=0
    until [ -b "/dev/$name" ]; do
        tries=$((tries + 1))
        if [ $tries -gt 100 ]; then
            error disk "$name-missing"
            return
        fi
        sleep 0.1
    done
    half_kib=$(($(blockdev --getsize64 "/dev/$name") / 2048))
    if [ $((half_kib / STRIPE_KIB)) -lt "$workers" ] || [ $half_kib -lt $MINIMUM_HALF_KIB ]; then
        error disk "$name-too-small"
        return
    fi
    mkfs.ext4 -q -F -b 4096 "/dev/$name" $((half_kib / 4)) || error mkfs "$name"
    mkdir -p "$folder"
    mount -t ext4 "/dev/$name" "$folder" || error mount "$name"
    mkdir "$folder/kept"
    for file in a b c d; do
        dd if=/dev/urandom of="$folder/kept/$file" bs=64k count=16 conv=fsync status=none ||
            error fsync "$name-$file"
    done
    (cd "$folder/kept" && sha256sum ./*) > "/run/$name.sums"

    report load disk="$name" workers="$workers"
    mkdir /run/measured 2> /dev/null && depth &
    worker=0
    while [ $worker -lt "$workers" ]; do
        direct $worker &
        worker=$((worker + 1))
    done
    synced &
    cached &
    wait

    umount "$folder" || error umount "$name"
    fsck.ext4 -f -n "/dev/$name" > "/run/$name.fsck" 2>&1 || error fsck "$name"
}

# 4: do not tell dmesg of each time that the caches are dropped.
echo 4 > /proc/sys/vm/drop_caches
# The kernel's own measurement: from a request's issue to its completion, the longest for each
# sector (Documentation/trace/histogram.rst). By the clock that the kernel keeps from going back,
# which an emulated processor's counter does when that moves to another one of the host's.
echo 'hist:keys=dev,sector:since=common_timestamp.usecs:clock=mono:size=16384' \
    > $trace/block_rq_issue/trigger
echo 'hist:keys=dev,sector:took=common_timestamp.usecs-$since:onmax($took).save(nr_sector):clock=mono:size=16384' \
    > $trace/block_rq_complete/trigger

for disk in $(option disk vda | tr , ' '); do
    load "$disk" &
done
wait

# What has more than 15 digits was below zero: that clock may go back, too, between two processors.
longest=$(sed -n 's/.*max: *\([0-9]*\).*/\1/p' $trace/block_rq_complete/hist |
    grep -v '[0-9]\{16\}' | sort -n | tail -1)
if grep -E "virtio|nvme" /proc/interrupts | grep -q MSI; then interrupts=msix; else interrupts=intx; fi
report disk longest_io_us="${longest:-unknown}" depth="$(cat /run/depth || echo unknown)" \
    interrupts="$interrupts"
