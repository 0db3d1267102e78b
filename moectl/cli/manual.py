"""The man pages, made from the verbs, the guides and the tables below.

Equal sources give equal pages on every machine, so that a test can compare: the date is the release's. click-man would
leave out arguments, environment, files and the exit status, and lists nothing by section.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from moectl import __date__, __version__
from moectl.cli.guides import TOPICS, Guide, read_guide
from moectl.cli.roff import NEEDS_TBL, RAGGED, below, bold, escape, literal, sentences, to_roff
from moectl.cli.verb import Verb, Verbs, value_name
from moectl.errors import StateError
from moectl.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class ManualEntry:
    """A variable, a file or a key. A verb makes use of it if it has one of the parameters (none: every verb does)."""

    name: str
    text: str
    parameters: frozenset[str] = frozenset()


_MODEL = frozenset({"model"})
_HOSTS = frozenset({"hosts"})
_SHARDS = frozenset({"shards", "output"})
_CHAT = frozenset({"no_history"})
_SETUP = frozenset({"undo"})
_SERVICE = frozenset({"at"})

ENVIRONMENT = (
    ManualEntry("MOECTL_HOSTFILE", "The hosts file, where --hostfile names none.", _HOSTS),
    ManualEntry(
        "HF_HOME, HF_TOKEN, HF_HUB_OFFLINE",
        "The cache of downloads, the token for them, and offline work.",
        _MODEL,
    ),
    ManualEntry("SSH_AUTH_SOCK", "The agent that holds the keys for the hosts.", _HOSTS),
    ManualEntry("MOECTL_SSH_CONFIG", "An ssh configuration to use in place of ~/.ssh/config.", _HOSTS),
    ManualEntry(
        "NO_COLOR, FORCE_COLOR",
        "No colours; or colours also without a terminal. --color comes before both.",
    ),
    ManualEntry("COLUMNS", "The width of tables, where the terminal does not tell it."),
    ManualEntry(
        "XDG_CONFIG_HOME, XDG_STATE_HOME, XDG_DATA_HOME, XDG_CACHE_HOME, XDG_RUNTIME_DIR",
        "Directories to use in place of ~/.config, ~/.local/state, ~/.local/share and ~/.cache below, and for the "
        "sockets of controllers.",
    ),
    ManualEntry("MOECTL_DEBUG", "1 shows where in moectl an error happened, for reports."),
)
FILES = (
    ManualEntry(
        "./hosts.txt, ~/.config/moectl/hosts.txt",
        "The hosts, where nothing else names them; moectl-hosts(5).",
        _HOSTS,
    ),
    ManualEntry("./moectl.toml, ~/.config/moectl/config.toml", "Defaults of options; see CONFIGURATION in moectl(1)."),
    ManualEntry("~/.local/state/moectl/deployment.json", "The current deployment: which host has which rank.", _HOSTS),
    ManualEntry("~/.local/state/moectl/setup.jsonl", "What setup ran on which host, and what undoes it.", _SETUP),
    ManualEntry("~/.config/systemd/user/moectl.service", "The service's unit, on Linux.", _SERVICE),
    ManualEntry("~/Library/LaunchAgents/moectl.serve.plist", "The service on a Mac, at login.", _SERVICE),
    ManualEntry("/Library/LaunchDaemons/moectl.serve.plist", "The service on a Mac, at boot.", _SERVICE),
    ManualEntry("~/.local/state/moectl/service.json", "What the service runs.", _SERVICE),
    ManualEntry("~/.local/state/moectl/logs/controller-service.log", "What the service says.", _SERVICE),
    ManualEntry("~/.local/state/moectl/history", "What was typed in chats; only its owner can read it.", _CHAT),
    ManualEntry("~/.local/state/moectl/run/, $XDG_RUNTIME_DIR/moectl/", "Where running controllers listen.", _HOSTS),
    ManualEntry("~/.local/share/moectl/shards/", "Shard sets, one directory each.", _SHARDS),
    ManualEntry(
        "~/.cache/moectl/shards/", "Shard sets that moectl cut by itself, for --model and for the demo.", _MODEL
    ),
    ManualEntry("~/.moectl/", "On each host: its software in env/, its shards in shards/, its logs in logs/.", _HOSTS),
)
CONFIGURATION = (
    "An option's value comes from the command line; else from the variable MOECTL_VERB_OPTION, such as "
    "MOECTL_RUN_MAX_TOKENS for 'moectl run --max-tokens'; else from ./moectl.toml; else from "
    "~/.config/moectl/config.toml; else it is the built-in one. In these files a key at the top is the default of "
    "every verb that has such an option, and a table holds one verb's:\n\n"
    '\b\nhostfile = "~/cluster/hosts.txt"\n[run]\nmax_tokens = 512'
)
OUTPUT = (
    "The answer or the table is written to standard output, all else to standard error. With --json, standard output "
    "is one document with a 'schema' field, sizes in bytes and times in seconds; an error is the last line of standard "
    'error, as {"error": {"code": …, "message": …, "hint": …}}. Running a verb again resumes what was interrupted.'
)
_CODES = {
    0: "Done; also where there was nothing to do.",
    1: "A bug in moectl, or a reason that has no code of its own.",
    2: "The command line is wrong.",
    3: "Some hosts or checks failed. Where all failed for one reason, the code is that of the reason.",
    4: "The hosts file is wrong, or the model cannot run in this way.",
    5: "A host cannot be reached, refuses the login, or has an unknown or a changed host key.",
    6: "A command on a host failed, or versions differ.",
    7: "Files are damaged: their bytes do not have the right hash.",
    8: "Something has to be done first: nothing is sharded, deployed or running, or it is running already.",
    130: "Interrupted with Ctrl-C.",
    141: "The reader of the output has closed it, as 'head' does. It is 0 where all was written before.",
    143: "Terminated.",
}
_HOST_KEYS = (
    ManualEntry(
        "ip=ADDRESS[,ADDRESS...]",
        "Addresses for tensor traffic, one for each link. Without it, the address by which SSH reached the host.",
    ),
    ManualEntry(
        "rdma=DEVICE[,DEVICE...]",
        "The RDMA device towards each rank in order, - for the host itself: JACCL over Thunderbolt 5. Several cables "
        "to one host are joined by +. moectl setup writes it.",
    ),
    ManualEntry("memory=SIZE", "The memory that plans may use, such as 120GB (10^9 bytes) or 112GiB (2^30)."),
    ManualEntry(
        "chip=NAME",
        "The chip, for plans: m2-ultra, m4-max and so on; completion of --chip lists them.",
    ),
    ManualEntry(
        "price=USD",
        "The price of the host, for plans: they show the speed per dollar. Without it, the price at launch counts "
        "where it is known for this size of memory.",
    ),
    ManualEntry("python=PATH", "The interpreter to use, if not the first suitable python3."),
    ManualEntry("dir=PATH", "Where moectl keeps its files there, if not in ~/.moectl."),
)
_HOSTS_EXAMPLE = """\
# four Mac Studios on a 10 GbE switch
mac1  ip=10.0.0.1
mac2  ip=10.0.0.2  memory=120GB             # keep some for the desktop
ada@mac3.local:2222  ip=10.0.0.3,10.0.1.3  python=/opt/venv/bin/python
mac4  ip=10.0.0.4  dir=/Volumes/fast/moectl
"""


def pages(cli: Verbs) -> dict[str, str]:
    """Return every page's source by its path: moectl(1), visible verbs and aliases, moectl-hosts(5), guides."""
    verbs = [verb for section in cli.by_section().values() for verb in section.values()]
    found = {"man1/moectl.1": _main_page(cli), "man5/moectl-hosts.5": _hosts_page()}
    for verb in verbs:
        found[f"man1/moectl-{verb.name}.1"] = _verb_page(cli, verb)
        for alias in cli.aliases(verb):
            found[f"man1/moectl-{alias}.1"] = f".so man1/moectl-{verb.name}.1\n"
    return found | {f"man7/moectl-{topic}.7": _guide_page(read_guide(topic)) for topic in TOPICS}


def write_files(directory: Path, files: dict[str, str]) -> None:
    """Write texts below a directory, which is made. Raises StateError."""
    for name, text in files.items():
        try:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"cannot make {(directory / name).parent}: {error.strerror}") from None
        write_whole(directory / name, text.encode())


def _main_page(cli: Verbs) -> str:
    page = _Page("moectl", 1, cli.summary)
    page.section("SYNOPSIS")
    page.add(r"\fBmoectl\fR \fIVERB\fR [\fIOPTION\fR]... [\fIARGUMENT\fR]...")
    page.section("DESCRIPTION")
    page.paragraphs(
        f"{cli.help}\n\nEach verb has a page of its own, such as moectl-run(1), and answers to --help. "
        "Guides are pages of section 7, such as moectl-daily(7); 'moectl help' lists them."
    )
    for section, verbs in cli.by_section().items():
        page.add(f".SS {section}")
        for name, verb in verbs.items():
            also = "".join(f", {alias}" for alias in cli.aliases(verb))
            page.item(bold(f"moectl {name}") + escape(also), verb.summary)
    page.section("OPTIONS")
    page.options(cli, _context(cli))
    page.section("CONFIGURATION")
    page.paragraphs(CONFIGURATION)
    page.section("OUTPUT")
    page.paragraphs(OUTPUT)
    page.ending(cli.examples, ENVIRONMENT, FILES)
    others = [f"moectl-{name}(1)" for verbs in cli.by_section().values() for name in verbs]
    page.see_also(*others, "moectl-hosts(5)", *(f"moectl-{topic}(7)" for topic in TOPICS), "ssh_config(5)")
    return page.text


def _verb_page(cli: Verbs, verb: Verb) -> str:
    parameters = {parameter.name or "" for parameter in verb.params}

    def used(entry: ManualEntry) -> bool:
        return not entry.parameters or not entry.parameters.isdisjoint(parameters)

    page = _Page(f"moectl-{verb.name}", 1, verb.summary)
    page.section("SYNOPSIS")
    arguments = " ".join(_argument(p) for p in verb.params if isinstance(p, click.Argument))
    page.add(rf"{bold(f'moectl {verb.name}')} [\fIOPTION\fR]... {arguments}".rstrip())
    page.section("DESCRIPTION")
    page.paragraphs(verb.help or "")
    page.section("OPTIONS")
    page.options(verb, click.Context(verb, parent=_context(cli)))
    variable = ManualEntry(
        f"MOECTL_{(verb.name or '').upper()}_OPTION", "The default of an option; see CONFIGURATION in moectl(1)."
    )
    page.ending(verb.examples, filter(used, (variable, *ENVIRONMENT)), filter(used, FILES))
    page.see_also("moectl(1)", *(["moectl-hosts(5)"] if "hosts" in parameters else []))
    return page.text


def _hosts_page() -> str:
    page = _Page("moectl-hosts", 5, "the list of hosts that moectl runs a model on")
    page.section("SYNOPSIS")
    page.add(r"\fI[user@]host[:port]\fR [\fIkey\fR=\fIvalue\fR]... [# \fIcomment\fR]")
    page.section("DESCRIPTION")
    page.paragraphs(
        "A hosts file is UTF-8 text with one host per line. Line order is rank order, and the first host coordinates. "
        "A # at the beginning of a line or after a space begins a comment. No host may be listed twice; 'localhost' is "
        "this machine, without SSH.\n\n"
        "A host is an alias of ssh_config(5), a DNS name, an IPv4 address, or an IPv6 address. An IPv6 address stands "
        "in brackets where a port follows, or where its end could be a port. Everything that ssh knows (user, port, "
        "key, jump host) belongs in ~/.ssh/config.\n\n"
        "moectl also reads MLX's JSON hostfiles: files that begin with { or [. The keys memory, python and dir may "
        "stand in them. It also reads the ring's own file (MLX_HOSTFILE): ssh then gets its addresses, and moectl "
        "chooses the ports itself. 'moectl hosts --mlx' writes a hostfile.\n\n"
        "moectl takes the hosts of --hosts a,b; else of --hostfile; else of $MOECTL_HOSTFILE; else of ./hosts.txt; "
        "else of ~/.config/moectl/hosts.txt. With '--hostfile -' it reads them from standard input."
    )
    page.section("OPTIONS")
    page.paragraphs("Any other key is an error.")
    for key in _HOST_KEYS:
        page.item(bold(key.name), key.text)
    page.section("EXAMPLES")
    page.add(*literal(_HOSTS_EXAMPLE))
    page.entries("ENVIRONMENT", ENVIRONMENT[:1])
    page.entries("FILES", FILES[:1])
    page.section("EXIT STATUS")
    page.paragraphs("Every verb exits with 4 when the hosts file in force is wrong, and names file and line.")
    page.see_also("moectl(1)", "moectl-hosts(1)", "ssh_config(5)")
    return page.text


def _guide_page(guide: Guide) -> str:
    page = _Page(f"moectl-{guide.topic}", 7, guide.summary)
    page.section("DESCRIPTION")
    page.markdown(guide.text("moectl-{}(7)"))
    page.see_also("moectl(1)", *(f"moectl-{topic}(7)" for topic in TOPICS if topic != guide.topic))
    return page.text


class _Page:
    """One page in the macros of man(7), as it grows."""

    def __init__(self, name: str, section: int, summary: str) -> None:
        title = f'.TH {name.upper()} {section} {__date__} "moectl {__version__}" "moectl manual"'.replace("-", r"\-")
        self._lines = [title.replace(__date__.replace("-", r"\-"), __date__)]
        self.section("NAME")
        summary = summary.rstrip(".")
        self.add(rf"{escape(name, code=True)} \- {escape(summary[:1].lower() + summary[1:])}")

    @property
    def text(self) -> str:
        return "\n".join(self._lines) + "\n"

    def add(self, *lines: str) -> None:
        """Add lines of source."""
        self._lines += below(self._lines[-1], lines)

    def section(self, title: str) -> None:
        self.add(f".SH {title}")

    def paragraphs(self, text: str) -> None:
        """Add paragraphs that are divided by empty lines; what click was told not to wrap stays as it is."""
        for paragraph in text.split("\n\n"):
            if paragraph.startswith("\b\n"):
                self.add(*literal(paragraph[2:]))
            else:
                self.add(".PP", *sentences(escape(" ".join(paragraph.split()))))

    def markdown(self, text: str) -> None:
        """Add a text in Markdown."""
        lines = to_roff(text)
        if ".TS" in lines:
            self._lines.insert(0, NEEDS_TBL)
            self.add(*RAGGED)
        self.add(*lines)

    def item(self, tag: str, text: str) -> None:
        """Add a tagged paragraph; the tag is source, the text is not."""
        self.add(".TP", tag, *sentences(escape(text)))

    def options(self, command: click.Command, ctx: click.Context) -> None:
        """Add a command's options, in the order of its --help."""
        for parameter in command.get_params(ctx):
            if isinstance(parameter, click.Option) and not parameter.hidden:
                self.item(_option(parameter), _option_text(parameter))

    def entries(self, title: str, entries: Iterable[ManualEntry]) -> None:
        """Add a section of variables, files or keys."""
        self.section(title)
        for entry in entries:
            self.item(", ".join(bold(name) for name in entry.name.split(", ")), entry.text)

    def ending(self, examples: Iterable[str], environment: Iterable[ManualEntry], files: Iterable[ManualEntry]) -> None:
        """Add what stands at the end of every verb's page."""
        self.section("EXAMPLES")
        self.add(*literal("\n".join(examples)))
        self.entries("ENVIRONMENT", environment)
        self.entries("FILES", files)
        self.section("EXIT STATUS")
        for code, text in _CODES.items():
            self.item(bold(str(code)), text)

    def see_also(self, *names: str) -> None:
        self.section("SEE ALSO")
        pages = (name.rstrip(")").split("(") for name in names)
        self.add(*",\n".join(rf"{bold(base)}({section})" for base, section in pages).split("\n"))


def _context(cli: Verbs) -> click.Context:
    return click.Context(cli, info_name="moectl", help_option_names=cli.context_settings["help_option_names"])


def _argument(argument: click.Argument) -> str:
    name = (argument.metavar or argument.name or "").strip("[]_").upper()
    source = rf"\fI{escape(name, code=True)}\fR"
    if not argument.required:
        source = f"[{source}]"
    return f"{source}..." if argument.nargs == -1 else source


def _option(option: click.Option) -> str:
    # By length: before click 8.5 those of --help come in any order.
    spellings = ", ".join(map(bold, sorted((*option.opts, *option.secondary_opts), key=len)))
    value = value_name(option)
    return rf"{spellings} \fI{escape(value, code=True)}\fR" if value else spellings


def _option_text(option: click.Option) -> str:
    """Return an option's help with its default and what it may be."""
    texts = [option.help or ""]
    if isinstance(option.type, click.IntRange | click.FloatRange) and not option.count:
        texts.append(_bounds(option.type))
    if option.show_default and option.default is not None:
        texts.append(f"Default: {_number(option.default)}.")
    return " ".join(text for text in texts if text)


def _bounds(kind: click.IntRange | click.FloatRange) -> str:
    above = "More than" if kind.min_open else "At least"
    least = "" if kind.min is None else f"{above} {_number(kind.min)}"
    most = "" if kind.max is None else f"{'less than' if kind.max_open else 'at most'} {_number(kind.max)}"
    text = ", ".join(part for part in (least, most) if part)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
