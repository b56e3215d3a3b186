# What the guest's scripts share. A report line is one write, so lines of several jobs never mix.
REPORT=/dev/ttyS1
STOP=/run/stop

report() { echo "FERRY $*" > "$REPORT"; }

# error WHAT DETAIL: counted, and told at once. DETAIL is one word.
error() {
    echo "$1 $2" >> /run/errors
    report error what="$1" detail="$2"
}

# option NAME DEFAULT: the value of ferry.NAME= on the kernel command line.
option() {
    for word in $(cat /proc/cmdline); do
        case $word in
            "ferry.$1="*)
                echo "${word#*=}"
                return
                ;;
        esac
    done
    echo "$2"
}

stopped() { [ -e "$STOP" ]; }

checksum() { sha256sum | cut -d ' ' -f 1; }
