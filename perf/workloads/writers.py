"""What writes to the memory of a real guest: shell scripts for the one of `lab.qemu`.

Each of them first fills the guest's page cache with what a disk of the VMM's own holds, which is
the one that can only be read, and then does its work over and over in a file in memory, with
content from that disk. It reports `FERRY load`, and `FERRY work n=NUMBER` for each piece of work.
Options of the kernel's command line: `ferry.writer` is `idle`, `database` or MiB a second;
`ferry.set` is the size of what is written, in MiB.
"""

from perf.errors import BenchUsageError

NAME = "writer"
"""Of the workload."""
IDLE, DATABASE = "idle", "database"
PIECES_PER_S = 8
"""A writer with a rate does its work in so many pieces a second, the idle guest looks whether it
is to stop."""

SCRIPT = f"""
. /lib/ferry.sh
for disk in /sys/block/vd*; do
    [ "$(cat $disk/ro)" = 1 ] && content=/dev/${{disk##*/}}
done
[ "$content" ] || error content missing
writer=$(option writer idle)
set_mib=$(option set 64)
work=/run/work
units=$((set_mib * 16))        # of 64 KiB
exec 3< $content                # the last one that closes a disk empties its cache
cat $content > /dev/null
dd if=$content of=$work bs=1M count=$set_mib status=none
report load what=$writer

n=0
piece() {{
    n=$((n + 1))
    report work n=$n
}}

centiseconds() {{
    read -r now _ < /proc/uptime
    now=${{now%.*}}${{now#*.}}
}}

# Until the next piece is due. Time that was lost is not caught up.
pause() {{
    centiseconds
    due=$((due + 100 / {PIECES_PER_S}))
    [ $due -lt $now ] && due=$now
    late=$((due - now))
    [ $late -gt 0 ] && sleep 0.$((late / 10))$((late % 10))
}}

idle() {{
    until stopped; do
        piece
        pause
    done
}}

# paced MIB: so many a second, round and round in the whole set.
paced() {{
    count=$(($1 * 16 / {PIECES_PER_S}))
    at=0
    until stopped; do
        [ $((at + count)) -gt $units ] && at=0
        dd if=$content of=$work bs=64k count=$count skip=$((n * 5 % 512 + at)) seek=$at \\
            conv=notrunc status=none
        at=$((at + count))
        piece
        pause
    done
}}

# As fast as it goes: each piece writes three pages of 8 KiB anywhere and one behind the others of a
# log.
database() {{
    pages=$((set_mib * 128)) random=1 log=0
    until stopped; do
        for _ in 1 2 3; do
            random=$(((random * 1103515245 + 12345) % 2147483648))
            put $((random / 16 % pages)) $work
        done
        put $((log % 1024)) /run/log
        log=$((log + 1))
        piece
    done
}}

# put PAGE FILE
put() {{
    dd if=$content of=$2 bs=8k count=1 skip=$(((n * 13 + $1) % 8192)) seek=$1 conv=notrunc \\
        status=none
}}

centiseconds
due=$now
case $writer in
    idle | database) $writer ;;
    *) paced $writer ;;
esac
"""


def check(writer: str) -> None:
    """Raises `BenchUsageError` for a writer that there is not."""
    if writer not in (IDLE, DATABASE) and not (writer.isdecimal() and 0 < int(writer) <= 1000):
        raise BenchUsageError(
            f"there is no writer {writer!r}; there are {IDLE}, {DATABASE}, and MiB a second: 16"
        )
