"""How a command passes the login shell of a host's account, for every shell, and for a shell that prints.

sshd gives a command to that shell as text. sh, bash, zsh, csh, tcsh and fish treat quotes, backslashes, '!' and line
ends differently, so the text has none of these: it starts /bin/sh, which decodes the command. What comes before `BEGUN`
on stdout was printed by the shell; an error quotes what another shell prints.
"""

from __future__ import annotations

import re

from moectl.errors import CommandFailed
from moectl.text import last_line

BEGUN = b"\n<<moectl>>\n"
ANNOUNCE = r"printf '\n<<moectl>>\n'; "  # a shell that prints the command prints it encoded
NOISE_BYTES = 1 << 18  # a shell that prints more does not reach the command
# Old versions of csh allow no longer words.
_WORD = re.compile(r"(?:\\0[0-7]{3}|[^\\]){1,200}")
_SPECIAL = re.compile(r"[^A-Za-z0-9 ./_:=,@-]")


class ShellError(OSError):
    """A login shell did not run the command; the message is what it printed."""


def encode_line(line: str) -> str:
    """Return a line of POSIX shell as one for any login shell."""
    encoded = _SPECIAL.sub(lambda found: "".join(f"\\0{byte:03o}" for byte in found[0].encode()), line)
    words = " ".join(f"'{word}'" for word in _WORD.findall(encoded))
    return f"""exec /bin/sh -c 'eval "$(printf %b "$@")"' sh {words}"""


def split_noise(stdout: bytes) -> tuple[bytes, bytes | None]:
    """Return (what the login shell printed, the command's own output); None where the command has not begun."""
    noise, begun, own = stdout.partition(BEGUN)
    return noise, own if begun else None


def explain_shell(noise: bytes, stderr: bytes, code: int, host: str) -> CommandFailed:
    """Return the error for a command that did not begin: the last line of the shell says why."""
    said = (last_line(noise) or last_line(stderr))[:200]
    return CommandFailed(
        f"its login shell does not run commands: {said or f'exit code {code}'}",
        host=host,
        hint="over ssh, 'true' has to end at once and print nothing: give that account sh, bash, zsh, csh, tcsh or "
        "fish (chsh), or look at its shell's startup files and at sshd's ForceCommand",
    )


def describe_quiet(shell: str) -> str:
    """Return what to change so that a login shell ("/bin/tcsh") is silent without a terminal, and in which file."""
    match shell.rsplit("/", 1)[-1]:
        case "bash":
            return "in its ~/.bashrc, before what prints: case $- in *i*) ;; *) return;; esac"
        case "zsh":
            return "move what prints from its ~/.zshenv to its ~/.zshrc"
        case "csh":
            return "in its ~/.cshrc, before what prints: if (! $?prompt) exit"
        case "tcsh":
            return "in its ~/.tcshrc (or ~/.cshrc), before what prints: if (! $?prompt) exit"
        case "fish":
            return "in its ~/.config/fish/config.fish, before what prints: status is-interactive; or return"
        case _:
            return "look at the startup files of its login shell, and at sshd's ForceCommand"
