#!/usr/bin/env bash
# A Ray cluster of plain machines. On the head, then on every other machine, in a terminal or as a service:
#
#   ./launch/ray_cluster.sh head
#   ./launch/ray_cluster.sh worker HEAD[:PORT]
#
# Ctrl-C or SIGTERM ends it: the run on it saves a checkpoint first. A node that Ray gave up after a broken link starts
# again by itself. All share one token, RAY_AUTH_TOKEN; without it the head makes one and says where it is kept.
#
#   LWO_RAY_PORT        6379   the head's port
#   LWO_DASHBOARD_PORT  8265   its pages and jobs, on loopback: ssh -L 8265:127.0.0.1:8265 HEAD
#   LWO_INTERFACE              network interface of this cluster, such as ib0; unset: Ray, gloo and NCCL choose
#   LWO_LEAVE_SECONDS   150    time for the checkpoint at the end
#   RAY_TMPDIR                 where Ray keeps logs and sockets; unset: lwo_dist-UID in TMPDIR, private to you

. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

token_file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
port=${LWO_RAY_PORT:-6379}
arguments=()

usage() {
  sed -n '2,/^$/{s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit "$1"
}

# The token, made once by the head, where Ray looks for it.
use_token() {
  export RAY_AUTH_MODE=token
  if [[ -n ${RAY_AUTH_TOKEN-} || -s $token_file ]]; then
    return
  fi
  [[ $1 == head ]] || fail "no token; set RAY_AUTH_TOKEN, or copy the head's $token_file to this machine"
  mkdir -p -- "$(dirname -- "$token_file")"
  (umask 077 && "$python" -c 'import secrets; print(secrets.token_hex(32))' >"$token_file")
  echo "the cluster's token is in $token_file; copy it to the other machines"
}

# By its address: gRPC asks DNS for names of /etc/hosts, too, and waits for ever where no server answers.
find_head() {
  local number
  number=$("$python" -c 'import socket, sys; print(socket.gethostbyname(sys.argv[1]))' "${address%:*}" 2>/dev/null) ||
    fail "worker ${address%:*}: no host of that name is known here; give the head's address, or name it in /etc/hosts"
  address=$number:${address##*:}
  arguments=("--address=$address")
}

use_interface() {
  local own
  [[ -n ${LWO_INTERFACE-} ]] || return 0
  own=$(ip -4 -o address show dev "$LWO_INTERFACE" 2>/dev/null | awk '{sub("/.*", "", $4); print $4; exit}' || true)
  [[ -n $own ]] || fail "LWO_INTERFACE = $LWO_INTERFACE: no such interface with an IPv4 address; see: ip address"
  arguments+=("--node-ip-address=$own")
  export GLOO_SOCKET_IFNAME=$LWO_INTERFACE NCCL_SOCKET_IFNAME=$LWO_INTERFACE
}

# Ray makes its own folders readable by everybody, so their parent is private, and must not belong to another user.
use_private_folder() {
  local folder
  [[ -z ${RAY_TMPDIR-} ]] || return 0
  folder=${TMPDIR:-/tmp}/lwo_dist-$UID
  ((${#folder} <= 35)) || folder=/tmp/lwo_dist-$UID  # a longer path leaves no room for Ray's socket names
  mkdir -m 700 -- "$folder" 2>/dev/null || true
  [[ -d $folder && ! -L $folder && -O $folder && $(stat -c %a -- "$folder") == 700 ]] ||
    fail "$folder is not a folder that only you can enter ($(stat -c '%U, %A' -- "$folder")); set RAY_TMPDIR to one"
  arguments+=("--temp-dir=$folder/ray")
}

# Ends what this script has started, and no other Ray of the machine, as `ray stop` would.
end() {
  trap '' TERM INT
  ended=yes
  RAY_ADDRESS=$address "$python" -m lwo_dist.cluster.drain --seconds "${LWO_LEAVE_SECONDS:-150}" || true
  kill -TERM "$child" 2>/dev/null || true
}

address=127.0.0.1:$port
case ${1-} in
  head)
    (($# == 1)) || usage 2 >&2
    arguments=(--head "--port=$port" --num-cpus=0 --num-gpus=0 --dashboard-host=127.0.0.1
      "--dashboard-port=${LWO_DASHBOARD_PORT:-8265}")
    ;;
  worker)
    (($# == 2)) || usage 2 >&2
    address=$2
    [[ $address == *:* ]] || address=$address:$port
    ;;
  -h | --help) usage 0 ;;
  *) usage 2 >&2 ;;
esac
[[ -x $python ]] || fail "$venv has no Python; install lwo_dist first (launch/quickstart.sh does), or set LWO_VENV"
[[ $1 == head ]] || find_head
use_interface
use_token "$1"
umask 077
use_private_folder
# A job that is stopped may save first; Ray's default is 3 s.
export RAY_USAGE_STATS_ENABLED=0 RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-120}
export PATH=$venv/bin:$PATH

ended=''
child=''
trap end TERM INT
while [[ -z $ended ]]; do
  # A process group of its own: Ctrl-C is for this script, which lets the run save first.
  setsid "$python" -m ray.scripts.scripts start --block --disable-usage-stats "${arguments[@]}" &
  child=$!
  code=0
  wait "$child" || code=$?
  if [[ -n $ended ]]; then
    wait "$child" 2>/dev/null || true
    exit 0
  fi
  [[ $1 == worker ]] || exit "$code"
  echo "this node's Ray ended ($code); starting it again in 10 s" >&2
  sleep 10
done
