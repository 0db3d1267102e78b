"""The tools of a fake Mac: scripts that stand in for macOS's own, and this machine's, held to the flags that macOS has.

Each script runs in the Mac's directory with this machine's tools; `$mac` is the PATH that it was called with. What it
prints is a file in `says`, which `tests.support.macs` describes.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

# sudo logs what it is to run but for `true`, and obeys the files beside it.
SUDO = r"""
refuse() { echo "$1" >&2; exit 1; }
if [ "$1" = -n ]; then
  shift; [ ! -s password ] || refuse "sudo: a password is required"
else
  shift 3; read -r typed; [ "$typed" = "$(cat password)" ] || refuse "sudo: 1 incorrect password attempt"
fi
[ "$*" != true ] || exit 0
echo "$*" >>sudo.log
read -r fails <fails; read -r cut_at <cut_at; read -r listener <listener
case "$*" in *"${fails:-nothing}"*) refuse "$1: ioctl (SIOCAIFADDR): Operation not permitted";; esac
case "$*" in *"${cut_at:-nothing}"*)  # the command runs, and nobody hears of its end
  parent=$$
  while session=$parent; parent=$(ps -o ppid= -p "$session" | tr -d ' '); [ "${parent:-0}" -gt 1 ]; do
    [ "$parent" != "$listener" ] || { kill -9 "$session"; break; }
  done;;
esac
PATH=$mac exec "$@"
"""
IFCONFIG = r"""
[ $# -gt 0 ] || exec cat interfaces/*
own=interfaces/$1
edit() { sed "$1" "$own" >new; cat new >"$own"; }
refuse() { echo "ifconfig: $1" >&2; exit 1; }
[ -e "$own" ] || refuse "interface $1 does not exist"
case "$2 $4" in
  "up ") edit '1s/<UP,/</; 1s/</<UP,/';;
  "down ") edit 's/<UP,/</';;
  "inet netmask")
    edit '/^[[:space:]]*inet /d'
    printf '\tinet %s netmask 0x%02x%02x%02x%02x\n' "$3" $(echo "$5" | tr . ' ') >>"$own";;
  "inet delete")
    grep -q "inet $3 " "$own" || refuse "ioctl (SIOCDIFADDR): Can't assign requested address"
    edit "/^[[:space:]]*inet $3 /d";;
  *) refuse "bad value";;
esac
"""
ROUTE = """
case "$1" in
  change) echo "$4" >"routes/$2";;
  delete) rm "routes/$2" 2>/dev/null || { echo "route: writing to routing socket: not in table" >&2; exit 1; };;
esac
"""
SYSCTL = """
code=0 form='s/^/&/'
for word; do
  case $word in -n) form='s/^[^:]*: //'; continue;; esac
  grep -q "^${word%%=*}: " says/sysctl || { echo "sysctl: unknown oid '${word%%=*}'" >&2; code=1; continue; }
  case $word in
    *=*)
      echo "$(grep "^${word%%=*}: " says/sysctl) -> ${word#*=}"
      sed "s/^${word%%=*}: .*/${word%%=*}: ${word#*=}/" says/sysctl >new; cat new >says/sysctl;;
    *) grep "^$word: " says/sysctl | sed "$form";;
  esac
done
exit $code
"""
PMSET = """
case "$1 $2" in
  -c*) for file in pmset pmset_custom; do sed "s/ $2 .*/ $2 $3/" "says/$file" >new; cat new >"says/$file"; done;;
  "-g custom") cat says/pmset_custom;;
  "-g ") cat says/pmset;;
  *) echo "Usage: pmset <options>" >&2; exit 1;;
esac
"""
# Its processes are lines of pid, uid, KiB, elapsed time, command.
PS = r"""
while [ $# -gt 0 ]; do
  case $1 in
    -axo|-o) format=$2; shift;;
    -axww|-ax) ;;
    -p) pid=$2; shift;;
    *) echo "ps: illegal option -- ${1#-}" >&2; exit 1;;
  esac
  shift
done
awk -v format="$format" -v pid="$pid" '
  BEGIN { count = split(format, keys, ",") }
  pid == "" || $1 == pid {
    command = $0; sub(/^ *[0-9]+ +[0-9]+ +[0-9]+ +[^ ]+ +/, "", command)
    said["pid"] = $1; said["uid"] = $2; said["rss"] = $3; said["etime"] = $4; said["args"] = said["command"] = command
    line = ""
    for (i = 1; i <= count; i++) { sub(/=.*/, "", keys[i]); line = line sprintf(i > 1 ? " %5s" : "%5s", said[keys[i]]) }
    print line; found = 1
  }
  END { exit !found }' says/processes
"""
SW_VERS = """
case "$1" in
  "") cat says/sw_vers;;
  -productVersion|--productVersion) sed -n 's/^ProductVersion:[[:space:]]*//p' says/sw_vers;;
  -buildVersion|--buildVersion) sed -n 's/^BuildVersion:[[:space:]]*//p' says/sw_vers;;
  *) exit 1;;
esac
"""
UNAME = """
case "$1" in ""|-s) echo Darwin;; -m) echo arm64;; -r) cat says/darwin;; *) exit 1;; esac
"""
CAFFEINATE = """
echo "$*" >>caffeinate.log
while [ $# -gt 0 ]; do case $1 in -w) while kill -0 "$2" 2>/dev/null; do sleep 0.2; done;; esac; shift; done
"""
XCODE_SELECT = """
[ ! -e tools ] || { echo /Library/Developer/CommandLineTools; exit; }
echo 'xcode-select: error: unable to get active developer directory, use `sudo xcode-select --switch'\\
  'path/to/Xcode.app` to set one (or see `man xcode-select`)' >&2
exit 2
"""
# /usr/bin/python3 without Command Line Tools.
STUB = """
echo "$0" >>dialogs.log
echo "xcode-select: note: No developer tools were found, requesting install." >&2
exit 1
"""
SECURITY = """
echo "security: SecKeychainItemCopyContent: User interaction is not allowed." >&2
exit 36
"""
# One job; `loaded` is its property list while launchd has it, `screen` is there while its user is logged in.
LAUNCHCTL = """
echo "$*" >>launchctl.log
refuse() { echo "$2" >&2; exit "$1"; }
case "$1 $2" in
  "print "*/*/*|"print system/"*) [ -e loaded ] || refuse 113 "Could not find service"; cat says/launchctl;;
  "print gui/"*) [ -e screen ] || refuse 125 "Domain does not support specified action";;
  "print-disabled "*) cat says/disabled;;
  "bootstrap "*)
    [ ! -e loaded ] && [ -e "$3" ] || refuse 5 "Bootstrap failed: 5: Input/output error"
    [ ! -s fails_to_start ] || refuse 5 "$(cat fails_to_start)"
    cp "$3" loaded;;
  "bootout "*) rm loaded 2>/dev/null || refuse 3 "Boot-out failed: 3: No such process";;
  "enable "*|"kickstart "*) ;;
  *) refuse 64 "Unrecognized subcommand: $1";;
esac
"""
FIREWALL_TOOL = "ApplicationFirewall/socketfilterfw"
FIREWALL = """
case "$1" in
  --getglobalstate) cat says/firewall;;
  --getblockall) echo "Firewall has block all state set to disabled.";;
  *) exit 1;;
esac
"""
# This machine's tools that every Unix has, and the flags that macOS's have too.
POSIX = {
    "cat": "", "date": "u", "du": "hsk", "env": "i", "grep": "EFciqvx", "head": "n", "hostname": "s", "id": "Fnu",
    "ls": "al", "locale": "", "mkdir": "p", "printenv": "", "rm": "dfr", "sed": "En", "tail": "n", "tr": "d",
    "true": "", "wc": "cl",
}  # fmt: skip
ONLY_BSD = """
for word; do
  case $word in
    --|[!-]*|"") break;;
    -*[!{flags}]*) echo "{name}: illegal option $word" >&2; echo "{name} $word" >>{refused}; exit 64;;
  esac
done
exec {real} "$@"
"""
# The command is text with octal numbers, in words of 200 letters (see `moectl.hosts.login_shell`).
LOGIN = """
export HOME={directory}/Users/ada SHELL=/bin/zsh PATH={directory}/usr/bin USER=ada LOGNAME=ada
exec /bin/sh -c "$(printf %s "$SSH_ORIGINAL_COMMAND" | PATH=/usr/bin:/bin sed -E -f {directory}/login.sed)"
"""
REWRITE = r"""s#' '##g
s#:/usr/bin:/bin:/usr/sbin:/sbin##g
s#([ =:]|\\0[0-7]{3})(/(usr|opt|Library|etc)/)#\1DIRECTORY\2#g
"""


def write_tools(directory: Path, *, with_rdma: bool) -> None:
    """Write all tools into a Mac's directory; `with_rdma`: also those that came with RDMA."""
    told = ["system_profiler", "networksetup", "vm_stat"]
    told += ["rdma_ctl", "ibv_devices", "ibv_devinfo"] if with_rdma else []
    scripts = {tool: f"cat says/{tool}\n" for tool in told}
    scripts |= {"sudo": SUDO, "ifconfig": IFCONFIG, "route": ROUTE, "sysctl": SYSCTL, "pmset": PMSET, "ps": PS}
    scripts |= {"sw_vers": SW_VERS, "uname": UNAME, "caffeinate": CAFFEINATE, "security": SECURITY}
    scripts |= {"xcode-select": XCODE_SELECT, "python3": STUB, f"../libexec/{FIREWALL_TOOL}": FIREWALL}
    tools = directory / "usr" / "bin"
    for tool, script in scripts.items():
        write_script(tools / tool, f"mac=$PATH PATH=/usr/bin:/bin\ncd {shlex.quote(str(directory))} || exit\n{script}")
    refused = shlex.quote(str(directory / "refused.log"))
    for tool, flags in POSIX.items():
        real = shutil.which(tool, path="/usr/bin:/bin")
        if real is not None:
            write_script(tools / tool, ONLY_BSD.format(flags=flags or "-", name=tool, refused=refused, real=real))
    (tools / "sh").symlink_to("/bin/sh")


def write_launchd(directory: Path) -> Path:
    """Write launchctl and sudo into a directory for this machine's own PATH, and return that directory of programs."""
    (directory / "says").mkdir(parents=True)
    for name in ("password", "fails", "cut_at", "listener", "fails_to_start", "says/launchctl", "says/disabled"):
        (directory / name).write_text("")
    for tool, script in {"sudo": SUDO, "launchctl": LAUNCHCTL}.items():
        write_script(directory / "bin" / tool, f"mac=$PATH\ncd {shlex.quote(str(directory))} || exit\n{script}")
    return directory / "bin"


def write_login(directory: Path) -> Path:
    """Write what sshd runs for a login, and return its path."""
    login = directory / "login"
    write_script(login, LOGIN.format(directory=directory))
    (directory / "login.sed").write_text(REWRITE.replace("DIRECTORY", str(directory)))
    return login


def write_script(path: Path, text: str) -> None:
    """Write a program of sh."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
