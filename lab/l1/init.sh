#!/bin/busybox sh
# The first process of the emulated host: the root file system of the real host, read-only, below a
# layer in memory; then the program whose script lies in the folder ferry.job= on the command line.
# What it prints goes to ttyS1, and at the end a line `FERRY exit STATUS`.
export PATH=/sbin:/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
exec </dev/null >/dev/console 2>&1
REPORT=/dev/ttyS1
stty -F $REPORT raw -echo

while read -r module; do
    insmod "/lib/modules/$module" || echo "no module $module"
done < /lib/modules/order

mkdir -p /host /layer /root2
mount -t tmpfs layer /layer
mkdir /layer/upper /layer/work
mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=loose,ro host /host
mount -t overlay root -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work /root2
for folder in dev proc sys; do mount --bind /$folder /root2/$folder; done
mkdir -p /dev/shm && mount -t tmpfs shm /dev/shm
ip link set lo up

for word in $(cat /proc/cmdline); do
    case $word in
        ferry.job=*) job=${word#*=} ;;
    esac
done
chroot /root2 /bin/sh "$job" > $REPORT 2>&1
echo "FERRY exit $?" > $REPORT
sleep 1
poweroff -f
