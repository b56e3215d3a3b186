# Load for a NIC: TCP in both directions at once, each direction's content with a checksum; the peer
# (lab/qemu/lan.py) has the other ones. An answer to the peer's ping needs no help.
. /lib/ferry.sh

interface=eth0
peer=10.53.0.1
guest=10.53.0.2/24
DOWN_PORT=7001
UP_PORT=7002

# The peer sends until nc, at the end of its input, closes our direction.
down() {
    until stopped; do sleep 0.1; done | nc $peer $DOWN_PORT | checksum > /run/net.down
    report net way=down sha="$(cat /run/net.down)"
}

up() {
    dd if=/dev/urandom of=/run/net.data bs=64k count=16 status=none
    mkfifo /run/net.up
    { until stopped; do cat /run/net.data; done; } | tee /run/net.up | nc $peer $UP_PORT &
    sum=$(checksum < /run/net.up)
    wait
    report net way=up sha="$sum"
}

# snmp PROTOCOL COUNTER: of /proc/net/snmp.
snmp() {
    awk -v protocol="$1:" -v counter="$2" '
        $1 == protocol && !at { for (i = 2; i <= NF; i++) if ($i == counter) at = i; next }
        $1 == protocol { print $at }' /proc/net/snmp
}

tries=0
until [ -e /sys/class/net/$interface ]; do
    tries=$((tries + 1))
    if [ $tries -gt 100 ]; then
        error net $interface-missing
        exit
    fi
    sleep 0.1
done
ip address add $guest dev $interface || error net address
ip link set $interface up || error net up
until [ "$(cat /sys/class/net/$interface/carrier)" = 1 ]; do sleep 0.1; done

report load net=$interface
down &
up &
wait
[ "$(snmp Tcp InCsumErrors)" = 0 ] || error net wrong-checksums
[ "$(cat /sys/class/net/$interface/carrier_changes)" -le 2 ] || error net link-lost
