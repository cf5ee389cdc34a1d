"""opencode."""

from autoresearch.agents.agent import SILENT, Agent, Answer, Output, amount, count, string, words


def read(output: Output) -> Answer:
    """Events, a line each. Its tokens in leave out those from a cache."""
    events = output.objects()
    steps = [event.get("part") for event in events if event.get("type") == "step_finish"]
    texts = [string(event, "part.text") for event in events if event.get("type") == "text"]
    errors = [event.get("error") for event in events if event.get("type") == "error"]
    return Answer(
        text="".join(texts[-1:]),
        error=(string(errors[-1], "data.message") or SILENT) if errors else "",
        status=count(errors[-1:], "data.statusCode"),
        cost_usd=amount(steps, "cost"),
        tokens_in=count(steps, "tokens.input", "tokens.cache.write", "tokens.cache.read"),
        tokens_cached=count(steps, "tokens.cache.read"),
        tokens_out=count(steps, "tokens.output", "tokens.reasoning"),
        turns=len(steps) or None,
    )


SETTINGS = """{"share": "disabled", "autoupdate": false, "snapshot": false, "lsp": false,
    "formatter": false, "permission": {"*": "deny", "read": "allow", "grep": "allow",
    "glob": "allow", "list": "allow", "edit": {"*": "deny", {edits}}}}"""

AGENT = Agent(
    "opencode",
    words("opencode run --format json --pure --title 'an experiment' {model}"),
    read,
    install="npm install -g opencode-ai",
    flag="-m",
    edit='"{path}": "allow"',
    env={
        "OPENCODE_CONFIG_CONTENT": SETTINGS,
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
        "OPENCODE_DISABLE_PROJECT_CONFIG": "1",
        "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
        "OPENCODE_DISABLE_CLAUDE_CODE": "1",
    },
    dollars=True,
)
