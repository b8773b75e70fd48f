"""What the documents promise is what the code does."""

from __future__ import annotations

import ast
import re
import textwrap
from functools import cache

import pytest

from tests.support.daemon import parse_logfmt
from tests.support.differences import DIFFERENCES, LACKING
from tests.support.loopback import ROOT
from willi_lib import config
from willi_lib.config.reader import NO_MAPPING
from willi_lib.config.settings import ALL_KEYS, MAPPING_KEYS, TOP_KEYS, TYPES, keys_of
from willi_lib.mappings.open import open_mappings
from willi_lib.routing.search import find_route
from willi_lib.smtp import reply as replies
from willi_lib.status.counts import FOR_PAGE, TABLE

EXAMPLE = (ROOT / "etc" / "willi.conf.example").read_text(encoding="utf-8")
MAPPING = "[mappings]\n[[all]]\ntype = static\nserver = mail.example.org\n"
TOP, _, MAPPINGS = EXAMPLE.partition("\n[mappings]\n")


def shown(text: str) -> dict[str, str]:
    """The keys behind a # and their values; a comment has a blank behind its #."""
    return dict(re.findall(r"^#(\w+) = ?(.*)$", text, re.MULTILINE))


def blocks() -> dict[str, str]:
    """The mappings of the example by type, without the comments among them."""
    sections = re.split(r"^#(?=\[\[)", MAPPINGS, flags=re.MULTILINE)[1:]
    plain = ["\n".join(re.findall(r"^#?(\[\[.*|\w+ =.*)$", section, re.MULTILINE)) for section in sections]
    return {shown(section)["type"]: text for section, text in zip(sections, plain, strict=True)}


def load(tmp_path, text: str) -> config.Settings:
    path = tmp_path / "willi.conf"
    path.write_text(text, encoding="utf-8")
    return config.load(str(path))


def test_the_example_shows_every_key_with_its_default_in_the_order_of_the_table():
    defaults = {name: key.default for name, key in TOP_KEYS.items()}
    assert shown(TOP) == defaults
    assert list(shown(TOP)) == list(defaults)


@pytest.mark.parametrize("kind", TYPES)
def test_the_example_shows_every_key_of_a_mapping_with_its_default(kind):
    keys = keys_of(TYPES[kind])
    section = next(part for part in re.split(r"^#\[\[", MAPPINGS, flags=re.MULTILINE) if f"#type = {kind}\n" in part)
    written = shown(section)
    assert written.keys() == keys.keys() | {"type"}
    required = {name for name, key in keys.items() if key.default is None}
    for name in keys.keys() - required:
        assert written[name] == keys[name].default, name


def test_the_example_without_changes_lacks_a_mapping_and_nothing_else(tmp_path):
    with pytest.raises(config.ConfigError) as error:
        load(tmp_path, EXAMPLE)
    line = EXAMPLE.split("\n").index("[mappings]") + 1
    assert error.value.faults == [f"{tmp_path}/willi.conf:{line}: [mappings]: {NO_MAPPING}"]


@pytest.mark.parametrize("name", shown(TOP))
def test_a_line_of_the_example_changes_nothing_without_its_hash(tmp_path, name):
    uncommented = TOP.replace(f"\n#{name} =", f"\n{name} =")
    assert uncommented != TOP
    assert load(tmp_path, f"{uncommented}\n{MAPPING}") == load(tmp_path, MAPPING)


@pytest.mark.parametrize("kind", TYPES)
def test_a_mapping_of_the_example_has_the_defaults_without_its_hashes(tmp_path, kind):
    whole = blocks()[kind]
    required = "\n".join(
        line
        for line in whole.split("\n")
        if line.startswith("[[") or MAPPING_KEYS[kind][line.split(" =")[0]].default is None
    )
    assert load(tmp_path, f"[mappings]\n{whole}\n") == load(tmp_path, f"[mappings]\n{required}\n")


# README.md, the pages for administrators and developers, and CHANGES.md

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
MANUAL = {"README": README} | {
    name: DOCS[name] for name in ("install.md", "configure.md", "operate.md", "from-the-go-program.md", "developing.md")
}
ALL_PAGES = "\n".join(MANUAL.values())
CHANGES = (ROOT / "CHANGES.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`\n]+)`", ALL_PAGES + CHANGES)  # all that stands between backticks in a line
LOG_LINES = [parse_logfmt(line) for line in re.findall(r"^t=.*", README, re.MULTILINE)]
LOG_FIELDS = {field for line in LOG_LINES for field in line}
REPLIES = {str(reply) for reply in vars(replies).values() if isinstance(reply, replies.Reply)}
MOST_LINES = 300  # of README.md: the first look, not the manual


def typed(program: str) -> set[str]:
    """The first arguments of this program, in quoted commands and in indented lines."""
    before = r"(?:^    |`)(?:\$ |\w+=\S+ |\S*python )?(?:\S*/)?"
    return set(re.findall(rf"{before}{re.escape(program)} (-{{0,2}}\w+)", ALL_PAGES, re.MULTILINE))


def rows(text: str) -> list[list[str]]:
    """The cells of the tables, backticks taken off, without the lines of names and dashes."""
    lines = re.findall(r"^\| (`.*) \|$", text, re.MULTILINE)
    return [[cell.strip("`") for cell in line.split(" | ")] for line in lines]


def section(page: str, title: str) -> str:
    return MANUAL[page].partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_metrics_of_the_page_are_the_rows_of_the_table():
    rows = re.findall(r"^\| `(willi_\w+)` \|([^|]*)\| ([^|]*) \|$", DOCS["monitoring.md"], re.MULTILINE)
    assert [(name, tuple(re.findall(r"`(\w+)`", labels)), text) for name, labels, text in rows] == [
        (metric.full_name, metric.labels, metric.text) for metric in TABLE.values() if metric.kind != FOR_PAGE
    ]


def test_the_readme_is_short_and_opens_every_other_page():
    assert README.count("\n") <= MOST_LINES
    opened = re.findall(r"^- \[.*?\]\((\S+?)\)", section("README", "The documents"), re.MULTILINE)
    assert {f"docs/{name}" for name in DOCS} <= set(opened)
    assert len(opened) == len(set(opened))


def test_no_paragraph_stands_twice():
    texts = [*MANUAL.values(), *(DOCS[name] for name in DOCS.keys() - MANUAL.keys())]
    paragraphs = [one for text in texts for one in text.split("\n\n") if len(one) > 100]
    assert len(paragraphs) == len(set(paragraphs))


def test_no_line_of_the_changes_stands_twice():
    """Lines that two branches add are merged by keeping both: a line that moved would come back."""
    lines = [line for line in CHANGES.splitlines() if line]
    assert [line for line in set(lines) if lines.count(line) > 1] == []


def test_the_manual_names_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "check", "test"} <= typed("make") <= targets


def test_the_manual_names_commands_and_options_that_exist():
    usage = (ROOT / "willi.py").read_text(encoding="utf-8").split('"""')[1]
    assert {"check", "lookup", "top", "--debug"} <= typed("willi.py") <= set(re.findall(r"(?<!\S)-{0,2}\w+", usage))


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}" for name in DOCS)])
def test_a_page_names_files_and_sections_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!http)([^)]+)\)", text)
    assert [name for name in linked if not (ROOT / page).parent.joinpath(name).exists()] == []
    named = re.findall(r"`((?:tests|etc)/[^` ]*)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "SECURITY.md", *(f"docs/{name}" for name in DOCS)])
def test_a_table_is_whole(page):
    """A head and its line of dashes, and as many cells in each row: a blank line would end it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for table in re.findall(r"^(?:\|.*\n)+", text, re.MULTILINE):
        head, dashes, *others = table.splitlines()
        assert re.fullmatch(r"\|(-+:?\|)+", dashes), head
        assert {line.count(" |") for line in others} == {dashes.count("|") - 1}, head


@pytest.mark.parametrize("name", sorted({text for text in QUOTED if re.fullmatch("[a-z][a-z0-9_]*", text)}))
def test_a_quoted_name_is_a_setting_or_a_field_of_the_log(name):
    assert name in ALL_KEYS | LOG_FIELDS


@pytest.mark.parametrize("line", sorted({text for text in QUOTED if re.fullmatch("[a-z_0-9]+ = .+", text)}))
def test_a_quoted_setting_is_right(tmp_path, line):
    name, _, value = line.partition(" = ")
    if name == "type":
        assert value in TYPES
    else:
        load(tmp_path, f"{line}\n{MAPPING}")


@pytest.mark.parametrize("text", sorted({text for text in QUOTED if re.match(r"\d{3} \d\.\d\.\d ", text)}))
def test_a_quoted_reply_is_one_that_willi_gives(text):
    assert text in REPLIES


def test_the_limits_of_the_manual_have_their_defaults():
    shown_defaults = {name: default for name, default, _ in rows(section("configure.md", "Limits and times"))}
    assert len(shown_defaults) > 10
    assert shown_defaults == {name: TOP_KEYS[name].default for name in shown_defaults}


def test_no_reply_is_held_back_for_longer_than_the_readme_says():
    [most] = re.findall(r"no reply waits for another for more than (\d+) seconds", " ".join(README.split()))
    code = "\n".join(
        (ROOT / "willi_lib" / name).read_text() for name in ("processes/worker.py", "proxy/transaction.py")
    )
    seconds = {name: float(value) for name, value in re.findall(r"^(HOLD|SETTLE_TIME) = ([0-9.]+)", code, re.MULTILINE)}
    assert 0 < 2 * seconds["HOLD"] <= float(most) >= seconds["SETTLE_TIME"]


def test_the_manual_explains_each_field_of_the_log_lines():
    explained = [field for field, _ in rows(section("operate.md", "The log"))]
    assert explained == [*max(LOG_LINES, key=lambda line: len(line))]
    assert {line["msg"] for line in LOG_LINES} == {"Message accepted", "Message rejected"}


def test_the_configuration_of_the_readme_can_be_used(tmp_path):
    settings, _ = re.findall(r"<<END\n(.*?)^    END$", README, re.MULTILINE | re.DOTALL)
    [table] = re.findall(r"^```\n(pattern;.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "upstream_servers.csv").write_text(table, encoding="utf-8")
    [mapping] = open_mappings(load(tmp_path, textwrap.dedent(settings)))
    mapping.load()
    assert mapping.facts().patterns == 3


def test_the_line_for_postmaster_in_the_readme_gives_it_a_route(tmp_path):
    [line] = [text for text in QUOTED if text.startswith("postmaster@")]
    settings, _ = re.findall(r"<<END\n(.*?)^    END$", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "upstream_servers.csv").write_text(f"pattern;server\n{line}\n", encoding="utf-8")
    loaded = load(tmp_path, textwrap.dedent(settings))
    [mapping] = open_mappings(loaded)
    mapping.load()
    assert find_route([mapping], f"postmaster@{loaded.domain}")


def test_a_host_name_that_the_status_refuses_is_not_promised(tmp_path):
    with pytest.raises(config.ConfigError):
        load(tmp_path, f"status_listen = localhost:8025\n{MAPPING}")
    promised = set(re.findall(r"status_listen = (\S+?)[`\s]", ALL_PAGES + EXAMPLE + DOCS["monitoring.md"]))
    assert promised == {"127.0.0.1:8025"}


def test_the_first_mail_of_the_readme_goes_in_clear_and_over_tls():
    in_clear = "swaks --server 127.0.0.1 --to ann@example.org"
    assert re.findall(r"^    (swaks .*)$", section("README", "Check"), re.MULTILINE) == [in_clear, f"{in_clear} -tls"]
    assert "No line of it may say *wrong* before the MX record" in section("README", "Check")


def test_what_to_do_after_an_upgrade_of_the_system_is_told_where_it_is_needed():
    assert "Keep the tarball on the host" in section("README", "Install")
    assert "run install.sh of the release again" in (ROOT / "willi.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", ["install.sh", "etc/willi.service", "etc/willi.init", "etc/willi.conf.example"])
def test_a_page_that_an_installed_file_names_is_in_the_release_and_has_that_section(path):
    text = " ".join((ROOT / path).read_text(encoding="utf-8").replace('\\"', '"').split())
    for page, title in re.findall(r'(README|docs/[\w-]+)\.md(?:(?:,| says under) "([^"]+)")?', text):
        name = page if page == "README" else page.removeprefix("docs/") + ".md"
        assert name in MANUAL or name in DOCS
        assert not title or section(name, title)


# docs/operate.md, "What the lines mean"

MEANINGS = re.findall(r"^\| (`.+?`) \| (\w+(?:, \w+)?) \|", MANUAL["operate.md"], re.MULTILINE)
EXPLAINED = [(text, levels.split(", ")) for texts, levels in MEANINGS for text in re.findall(r"`(.+?)`", texts)]
SOURCES = [ROOT / "willi.py", *sorted((ROOT / "willi_lib").rglob("*.py"))]
LEVELS = {"info": "info", "warn": "warn", "error": "error", "bug": "error"}


@cache
def nodes() -> list[ast.AST]:
    """Of all sources."""
    return [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


def text_of(node: ast.AST) -> str:
    """A string of the source; empty if it is anything else."""
    value = node.value if isinstance(node, ast.Constant) else ""
    return value if isinstance(value, str) else ""


def is_log(node: ast.expr) -> bool:
    """Whether this is `log`, or `self.log`."""
    return "log" in (getattr(node, "id", ""), getattr(node, "attr", ""))


def logged() -> set[tuple[str, str]]:
    """Each message that is written as log.warn("..."), and its level. Those that another process tells are not seen."""
    assigned = [node for node in nodes() if isinstance(node, ast.Assign)]
    names = {getattr(node.targets[0], "id", ""): text_of(node.value) for node in assigned}
    found = set()
    for node in nodes():
        if not (isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr in LEVELS and is_log(node.func.value):
            parts = list(ast.walk(node.args[0]))  # one of two texts, as it may be
            words = {names.get(part.id, "") if isinstance(part, ast.Name) else text_of(part) for part in parts}
            found |= {(text, LEVELS[node.func.attr]) for text in words - {""}}
    return found


def test_each_message_that_is_explained_stands_in_the_code():
    known = {text_of(node) for node in nodes()}
    assert len(EXPLAINED) > 50
    assert [message for message, _ in EXPLAINED if not any(message in text for text in known)] == []


def test_each_message_of_the_log_is_explained_with_its_level():
    messages = logged()
    assert len(messages) > 40
    explained = [(text, level) for text, levels in EXPLAINED for level in levels]
    told = {one for one in messages for start, level in explained if one[0].startswith(start) and one[1] == level}
    assert messages - told == set(), "docs/operate.md must explain these"


# docs/from-the-go-program.md

OLD = MANUAL["from-the-go-program.md"]


def test_the_database_of_the_go_program_is_written_in_its_new_form(tmp_path):
    [block] = re.findall(r"^\n((?:      \w+ = .*\n)+)", OLD, re.MULTILINE)
    new = f"[mappings]\n[[db]]\ntype = mysql\nquery = SELECT server FROM t WHERE pattern = ?\n{textwrap.dedent(block)}"
    [mapping] = load(tmp_path, new).mappings
    assert isinstance(mapping, config.MysqlSettings)
    user, password, host, database = re.findall(r"connection: (\w+):(\w+)@tcp\((.*?)\)/(\w+)\?tls=true", OLD)[0]
    [server] = mapping.hosts
    assert (mapping.user, mapping.database, f"{server.host}:{server.port}") == (user, database, host)
    assert password in block and mapping.tls_ca


def test_a_time_of_the_go_program_is_refused_and_its_new_form_taken(tmp_path):
    [(old, new)] = re.findall(r"what was (\S+) is `(\S+?)`", OLD)
    with pytest.raises(config.ConfigError):
        load(tmp_path, f"read_timeout = {old}\n{MAPPING}")
    assert load(tmp_path, f"read_timeout = {new}\n{MAPPING}").read_timeout == 90.0


def test_file_names_are_relative_to_the_directory_of_the_file_now(tmp_path):
    assert "Now they are relative to the directory of willi.conf" in " ".join(OLD.split())
    [mapping] = load(tmp_path, "[mappings]\n[[csv]]\ntype = csv\nfile = mapping.csv\n").mappings
    assert isinstance(mapping, config.CsvSettings)
    assert mapping.file == str(tmp_path / "mapping.csv")


def test_the_facility_and_the_owner_are_those_that_the_service_has():
    unit = (ROOT / "etc" / "willi.service").read_text(encoding="utf-8")
    assert "with facility mail" in OLD and "\nSyslogFacility=mail\n" in unit
    install = (ROOT / "install.sh").read_text(encoding="utf-8")
    assert (
        "chmod -R g+rX /opt/willi/etc; chmod 2750 /opt/willi/etc" in OLD
        and "install -d -m 2750 -o root -g willi $TARGET/etc" in install
    )


# docs/interoperation.md

INTEROPERATION = DOCS["interoperation.md"]


def cells(header: str) -> list[list[str]]:
    """The table of this page with these titles."""
    table = INTEROPERATION.partition(f"\n{header}\n|---")[2].partition("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines()[1:]]


def test_the_page_has_the_differences_that_the_tests_allow():
    documented = [[d.name, d.why, d.where, ", ".join(d.servers)] for d in DIFFERENCES]
    assert cells("| What | Why | See | With |") == documented
    assert cells("| Extension | What Willi does |") == [[name, what] for name, what in LACKING.items()]


def test_what_a_server_cannot_judge_is_told_with_settings_that_exist():
    told = "\n".join(setting for setting, _ in cells("| Setting of the server | What it would judge |"))
    assert "reject_unauth_pipelining, smtpd_forbid_unauth_pipelining" in told
    quoted = set(re.findall(r"`([a-z][a-z0-9_]*)`", INTEROPERATION))
    assert quoted <= ALL_KEYS and {"bare_newline", "max_connection_rate", "send_proxy"} <= quoted


def test_a_difference_names_a_page_and_a_section_that_exist():
    for difference in DIFFERENCES:
        for page, title in re.findall(r'(\S+), "(.*)"', difference.where):
            assert section(page, title), title


# SECURITY.md

SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
ATTACKS = [line for line in SECURITY.splitlines() if line.startswith("| ")][1:]
NAMED_TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", SECURITY)))


def names_of_tests(path: str) -> set[str]:
    module = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in module.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("path", sorted({path for path, _ in NAMED_TESTS}))
def test_every_test_that_covers_an_attack_exists(path):
    assert {name for where, name in NAMED_TESTS if where == path} - names_of_tests(path) == set()


def test_each_attack_has_an_answer_and_a_test():
    assert len(ATTACKS) > 20
    for row in ATTACKS:
        attack, answer, tests = row.strip("| ").split(" | ")
        assert attack and answer
        assert re.fullmatch(r"(`tests/[\w/]+\.py::test_\w+`(<br>|$))+", tests), row


def test_security_quotes_settings_replies_and_files_that_exist():
    quoted = set(re.findall(r"`([^`\n]+)`", SECURITY))
    settings = {text for text in quoted if re.fullmatch(r"[a-z][a-z0-9_]*", text)}
    assert settings <= ALL_KEYS and len(settings) > 10
    assert {text for text in quoted if re.match(r"\d{3} \d\.\d\.\d ", text)} <= REPLIES
    assert [name for name in re.findall(r"\]\((?!http)([^)]+)\)", SECURITY) if not (ROOT / name).exists()] == []
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make (\w+)`", SECURITY)) <= targets
