"""Tab in bash, zsh and fish: the scripts, and the lines between them and moectl. `suggest` and click say what to offer.

On each Tab press a script runs moectl with `_MOECTL_COMPLETE=SHELL_complete` and the line up to the cursor, and reads
one offer per line: kind, value and help, with tabs between. Click's own scripts fail on bash 3.2, which is macOS's, and
on words that hold a colon or follow an equals sign.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from typing import TYPE_CHECKING, Any

from click.shell_completion import CompletionItem, ShellComplete, add_completion_class, split_arg_string

from moectl.errors import MoectlError

if TYPE_CHECKING:
    from moectl.cli.verb import Verbs

VARIABLE = "_MOECTL_COMPLETE"
_UNSAFE = re.compile(r"[^\w@%+=:,./~\[\]-]")
_ASSIGNMENT = re.compile(r"\w+=")

_BASH = """\
# shellcheck shell=bash
# bash completion for moectl; made by `moectl completion bash`. It does without what bash 3.2, which is macOS's, lacks.

_moectl() {
    local kind value program=$1
    case $program in
        \\~/*) program=$HOME/${program:2} ;;
    esac
    COMPREPLY=()
    while IFS=$'\\t' read -r kind value _; do
        case $kind in
            file) _moectl_files default ;;
            dir) _moectl_files dirnames ;;
            plain) COMPREPLY[${#COMPREPLY[@]}]=$value ;;
        esac
    done < <(COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" COMP_WORD="$2" \\
        _MOECTL_COMPLETE=bash_complete "$program" 2>/dev/null)
}

# Without compopt (bash 3.2) an empty answer brings files by itself: see below.
_moectl_files() {
    if type compopt >/dev/null 2>&1; then
        compopt -o "$1"
    fi
}

if ! type compopt >/dev/null 2>&1; then
    complete -o default -F _moectl moectl
elif ! complete -o nosort -F _moectl moectl 2>/dev/null; then
    complete -F _moectl moectl
fi
"""

_ZSH = """\
#compdef moectl
# zsh completion for moectl; made by `moectl completion zsh`.

_moectl() {
    local program=${${(Q)words[1]}/#\\~\\//$HOME/} kind value help
    local -a bare described
    # Of --option=value only the value is to be replaced.
    compset -P '--*='
    while IFS=$'\\t' read -r kind value help; do
        case $kind in
            file) _files ;;
            dir) _files -/ ;;
            plain)
                if [[ -n $help ]]; then
                    described+=("${value//:/\\\\:}:$help")
                else
                    bare+=("$value")
                fi
                ;;
        esac
    done < <(COMP_LINE="${(j: :)words[1,CURRENT-1]} $IPREFIX$PREFIX" _MOECTL_COMPLETE=zsh_complete \\
        $program 2>/dev/null)
    if (( $#described )); then
        _describe -V moectl described
    fi
    if (( $#bare )); then
        compadd -V moectl -a bare
    fi
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _moectl "$@"
else
    compdef _moectl moectl
fi
"""

_FISH = """\
# fish completion for moectl; made by `moectl completion fish`.

function __moectl_complete
    set -l program (string replace -r '^~/' "$HOME/" -- (commandline -opc | string match -v -- '*=*')[1])
    set -l line (commandline -cp | string collect)
    set -l option (string match -r -- '^--[^=]+=' (commandline -ct))
    for offer in (env COMP_LINE="$line" _MOECTL_COMPLETE=fish_complete $program 2>/dev/null)
        set -l parts (string split -m 2 \\t -- $offer)
        switch $parts[1]
            case file
                for path in (__fish_complete_path "$parts[2]")
                    printf "%s\\n" "$option$path"
                end
            case dir
                for path in (__fish_complete_directories "$parts[2]")
                    printf "%s\\n" "$option$path"
                end
            case plain
                string join \\t -- $parts[2..]
        end
    end
end

complete --no-files --keep-order --command moectl --arguments '(__moectl_complete)'
"""


class _Lines(ShellComplete):
    """What the three shells share: the line comes in, offers go out, one per line."""

    script: str

    def source(self) -> str:
        """Return the shell's script."""
        return self.script

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the cursor's word, without the program's name, and that word's beginning."""
        line = self._line()
        words = split_arg_string(line)
        self._typed = words.pop() if words and not line[-1:].isspace() else ""
        # What stands before the program sets its environment: A=1 moectl …
        program = next((n for n, word in enumerate(words) if not _ASSIGNMENT.match(word)), 0)
        return words[program + 1 :], self._typed

    def _line(self) -> str:
        return os.environ["COMP_LINE"]

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Return an offer as a line."""
        value = item.value if item.type != "plain" else self.word(item.value)
        help_ = " ".join((item.help or "").split())
        return f"{item.type}\t{value}\t{help_}"

    def word(self, value: str) -> str:
        """Return what replaces the word at the cursor, as this shell divides words."""
        return value


class Bash(_Lines):
    """Bash, which breaks words at colons, equals signs and more, and does not quote what it is given."""

    name = "bash"
    script = _BASH

    def _line(self) -> str:
        line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
        # Bash 3.2 counts bytes: a point behind the last letter is the end; in ASCII, bytes are letters.
        return line[:point]

    def word(self, value: str) -> str:
        """Return the rest of the value after the part of the word that readline keeps, quoted where it has to be."""
        option = _option_part(self._typed)
        whole = option + value
        kept = self._typed.removesuffix(os.environ.get("COMP_WORD", ""))
        rest = whole.removeprefix(kept)
        return shlex.quote(rest) if _UNSAFE.search(rest) else rest


class Zsh(_Lines):
    """Zsh, which quotes by itself; its script removes the option's name."""

    name = "zsh"
    script = _ZSH


class Fish(_Lines):
    """Fish, which quotes by itself and replaces whole words."""

    name = "fish"
    script = _FISH

    def word(self, value: str) -> str:
        """Return the value with the option's name that stands before it in the same word."""
        return _option_part(self._typed) + value


SHELLS: dict[str, type[_Lines]] = {"bash": Bash, "zsh": Zsh, "fish": Fish}
FILES = {"bash": "moectl.bash", "zsh": "_moectl", "fish": "moectl.fish"}


def script(shell: str) -> str:
    """Return a shell's completion script."""
    return SHELLS[shell].script


def answer_tab(cli: Verbs) -> None:
    """Print the offers that the shell asks for in the environment."""
    from moectl.cli.config import read_config

    for shell in SHELLS.values():
        add_completion_class(shell)
    # A message or a traceback would stand in the line being typed.
    with contextlib.suppress(Exception, SystemExit):
        try:
            defaults = read_config(cli.parameter_names())
        except MoectlError:
            defaults = {}
        cli.main(args=[], prog_name="moectl", complete_var=VARIABLE, default_map=defaults)


def _option_part(typed: str) -> str:
    return typed[: typed.index("=") + 1] if typed.startswith("--") and "=" in typed else ""
