"""Codex."""

from autoresearch.agents.agent import SILENT, Agent, Answer, Output, count, string, words


def read(output: Output) -> Answer:
    """Events, a line each; the last message is the answer. Its retries look like errors."""
    usage, error, text, failed = None, "", "", False
    for event in output.objects():
        match event:
            case {"type": "turn.completed"}:
                usage, failed = event.get("usage"), False
            case {"type": "turn.failed"}:
                error, failed = string(event, "error.message"), True
            case {"type": "error"}:
                error = string(event, "message")
            case {"type": "item.completed", "item": {"type": "agent_message", "text": str(said)}}:
                text = said
    return Answer(
        text=text,
        error=(error or SILENT) if failed or usage is None else "",
        tokens_in=count([usage], "input_tokens"),
        tokens_cached=count([usage], "cached_input_tokens"),
        tokens_out=count([usage], "output_tokens"),
    )


# `codex login status` ignores a key in the environment and a provider of one's own
LOGGED_IN = """test -n "$CODEX_API_KEY" || codex login status ||
    grep -qs '^ *model_provider *=' "${CODEX_HOME:-$HOME/.codex}/config.toml" """

AGENT = Agent(
    "codex",
    words("""codex exec --json --ephemeral --sandbox workspace-write --disable plugins
        -c sandbox_workspace_write.exclude_slash_tmp=true
        -c sandbox_workspace_write.exclude_tmpdir_env_var=true {model} -"""),
    read,
    install="npm install -g @openai/codex",
    status=("sh", "-c", LOGGED_IN),
    login="codex login",
)
