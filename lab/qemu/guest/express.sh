# Registers above the first 256 bytes of configuration space: the masks of Advanced Error Reporting
# of a disk, which nothing else in the guest changes. Written now, read again at the end.
. /lib/ferry.sh

# In units of 4 bytes: the uncorrectable and the correctable mask of the first extended capability.
UNCORRECTABLE=66 CORRECTABLE=69

register() { dd if="$config" bs=4 skip=$1 count=1 status=none | od -An -tx4 | tr -d ' '; }

change() {
    printf "$2" | dd of="$config" bs=4 seek=$1 conv=notrunc status=none || error express "write-$1"
}

check() { [ "$(register $1)" = "$2" ] || error express "$3-$1-$(register $1)"; }

for device in /sys/bus/pci/devices/*; do
    [ "$(cat "$device/vendor")" = 0x1af4 ] && config=$device/config
done
change $UNCORRECTABLE '\020\000\001\000'
change $CORRECTABLE '\001\000\000\000'
check $UNCORRECTABLE 00010010 written
check $CORRECTABLE 00000001 written
report express
until stopped; do sleep 0.2; done
check $UNCORRECTABLE 00010010 lost
check $CORRECTABLE 00000001 lost
