"""Gemini CLI."""

from autoresearch.agents.agent import SILENT, Agent, Answer, Output, count, get, string, words


def read(output: Output) -> Answer:
    """One object; after a failure, another one at the end of standard error."""
    if not output.text().strip():
        error = output.last_error()
        status = count([error], "code") or 0
        said = string(error, "message") or SILENT
        return Answer(error=said, status=status if status > 99 else None)
    last = output.objects()[-1]
    models = get(last, "stats.models") or {}
    calls = list(models.values())
    return Answer(
        text=string(last, "response"),
        tokens_in=count(calls, "tokens.prompt"),
        tokens_cached=count(calls, "tokens.cached"),
        tokens_out=count(calls, "tokens.candidates", "tokens.thoughts"),
        turns=count(calls, "api.totalRequests"),
        model=", ".join(models) or None,
    )


SETTINGS = """{
    "general": {"maxAttempts": 1, "retryFetchErrors": false, "enableAutoUpdate": false},
    "model": {"maxSessionTurns": 30}, "hooksConfig": {"enabled": false}}"""
READING = ["read_file", "list_directory", "glob", "grep_search", "update_topic", "complete_task"]
POLICY = f"""\
[[rule]]
toolName = "*"
decision = "deny"
priority = 900
[[rule]]
toolName = {READING}
decision = "allow"
priority = 910
[[rule]]
toolName = ["replace", "write_file"]
argsPattern = '\\x00"file_path":"(\\./|{{regex}}/)?({{edits}})"\\x00'
decision = "allow"
priority = 920"""

AGENT = Agent(
    "gemini",
    words("""gemini --output-format json --skip-trust -e none
        --policy {folder}/gemini.toml {model}"""),
    read,
    install="npm install -g @google/gemini-cli",
    edit="{path_regex}",
    between="|",
    env={
        "GEMINI_CLI_SYSTEM_SETTINGS_PATH": "{folder}/gemini.json",
        "TMPDIR": "{folder}",
        "NO_COLOR": "1",
    },
    files={"gemini.json": SETTINGS, "gemini.toml": POLICY},
)
