"""pi."""

import re

from autoresearch.agents.agent import Agent, Answer, Output, amount, count, get, string, words


def read(output: Output) -> Answer:
    """Events, a line each, of which the messages that ended count. Exit code 0 says nothing."""
    ended = [event for event in output.objects() if event.get("type") == "message_end"]
    messages = [event.get("message") for event in ended]
    answers = [message for message in messages if get(message, "role") == "assistant"]
    if not answers:
        raise ValueError("no answer")
    last = answers[-1]
    error = string(last, "errorMessage") if string(last, "stopReason") == "error" else ""
    status = re.match(r"(\d{3}):", error)
    texts = [part for part in get(last, "content") or [] if get(part, "type") == "text"]
    return Answer(
        text="\n\n".join(string(part, "text") for part in texts),
        error=error,
        status=int(status[1]) if status else None,
        cost_usd=amount(answers, "usage.cost.total"),
        tokens_in=count(answers, "usage.input", "usage.cacheWrite", "usage.cacheRead"),
        tokens_cached=count(answers, "usage.cacheRead"),
        tokens_out=count(answers, "usage.output"),
        turns=len(answers),
    )


GUARD = """\
import { realpathSync } from "node:fs";
import { relative, resolve } from "node:path";
const real = (path) => { try { return realpathSync(path); } catch { return path; } };
const may = new RegExp(String.raw`^(?:{edits})$`);
export default function (pi) {
    pi.on("tool_call", async (event, context) => {
        const here = real(context.cwd ?? process.cwd());
        const path = relative(here, real(resolve(here, String(event.input?.path))));
        if (event.toolName === "read") return undefined;
        if (event.toolName === "edit" && may.test(path)) return undefined;
        return { block: true, reason: "Only {what} may be edited." };
    });
}"""

AGENT = Agent(
    "pi",
    words("""pi -p --mode json --no-session --no-extensions --no-skills --no-prompt-templates
        --no-themes --no-context-files --no-approve --tools read,edit -e {folder}/guard.mjs
        {model}"""),
    read,
    install="npm install -g @earendil-works/pi-coding-agent",
    edit="{path_regex}",
    between="|",
    env={"PI_TELEMETRY": "0"},
    files={"guard.mjs": GUARD},
    dollars=True,
)
