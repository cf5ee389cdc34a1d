"""aider."""

import re

from autoresearch.agents.agent import Agent, Answer, Output, amount, count, words


def read(output: Output) -> Answer:
    """The log of its requests has the cost, where 0 is unknown, the model's history the words."""
    log = output.objects("analytics.jsonl")
    sent = [entry.get("properties") for entry in log if entry.get("event") == "message_send"]
    said = output.text("llm.txt").rpartition("LLM RESPONSE")[2].splitlines()
    answer = [line.removeprefix("ASSISTANT ") for line in said if line.startswith("ASSISTANT")]
    errors = re.findall(r"^(?:litellm\.\w+: )+.*$", output.text(size=20_000), re.MULTILINE)
    return Answer(
        text="\n".join(answer),
        error="" if sent else ["it sent nothing", *errors][-1],
        turns=len(sent) or None,
        cost_usd=amount(sent, "cost") or None,
        tokens_in=count(sent, "prompt_tokens"),
        tokens_out=count(sent, "completion_tokens"),
    )


AGENT = Agent(
    "aider",
    words("""aider --message-file {file} {files} --no-git --no-gitignore --no-auto-commits
        --no-dirty-commits --no-analytics --analytics-log {side}.analytics.jsonl
        --llm-history-file {side}.llm.txt --chat-history-file {side}.chat.md
        --input-history-file {side}.input.txt --no-check-update --no-show-release-notes
        --no-show-model-warnings --no-detect-urls --no-suggest-shell-commands --no-auto-lint
        --no-auto-test --map-tokens 0 --no-stream --no-pretty --no-fancy-input {model}"""),
    read,
    install="uv tool install aider-chat",
    stdin="{folder}/aider.txt",
    files={"aider.txt": "n\n" * 200},  # at the end of its input it would answer yes
    dollars=True,
)
