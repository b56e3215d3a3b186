# No load: waits for `stop`.
. /lib/ferry.sh
while ! stopped; do sleep 0.2; done
