"""Claude Code."""

from autoresearch.agents.agent import Agent, Answer, Output, amount, count, get, string, words


def read(output: Output) -> Answer:
    """One object at the end. `subtype` says success on API errors too, so `is_error` counts."""
    ends = [value for value in output.objects() if value.get("type") == "result"]
    if not ends:
        raise ValueError("no result")
    last, text, failed = ends[-1], string(ends[-1], "result"), ends[-1].get("is_error") is True
    complaint = text or "; ".join(map(str, last.get("errors") or [])) or string(last, "subtype")
    cached = "usage.cache_read_input_tokens"
    written = "usage.cache_creation_input_tokens"
    return Answer(
        text="" if failed else text,
        error=complaint if failed else "",
        status=count([last], "api_error_status"),
        cost_usd=amount([last], "total_cost_usd"),
        tokens_in=count([last], "usage.input_tokens", written, cached),
        tokens_cached=count([last], cached),
        tokens_out=count([last], "usage.output_tokens"),
        turns=count([last], "num_turns"),
        model=", ".join(get(last, "modelUsage") or {}) or None,
    )


AGENT = Agent(
    "claude",
    words("""claude -p --output-format json --safe-mode --no-session-persistence
        --tools Read,Edit,Write,Grep,Glob --permission-mode dontAsk
        --allowedTools {edits} --max-turns 30 --max-budget-usd 1 {model}"""),
    read,
    install="npm install -g @anthropic-ai/claude-code",
    env={
        "CLAUDE_CODE_MAX_RETRIES": "1",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
    },
    edit="Edit(/{glob}/{path})",
    status=words("claude auth status"),
    login="claude auth login",
    dollars=True,
)
