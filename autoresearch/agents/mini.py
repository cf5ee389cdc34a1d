"""mini-swe-agent."""

import os

from autoresearch.agents.agent import Agent, Answer, Output, amount, count, get, string, words


def read(output: Output) -> Answer:
    """A file with the whole course. A cost of 0 is an unknown one."""
    course = output.objects("traj.json")[-1]
    messages = [None, *(course.get("messages") or [])]
    asked = [message for message in messages if get(message, "role") == "assistant"]
    status, last = string(course, "info.exit_status"), messages[-1]
    why = string(last, "extra.exception_str") or string(last, "content")
    said = string(course, "info.submission").strip()
    usage = "extra.response.usage"
    return Answer(
        text=said or (string(asked[-1], "content") if asked else ""),
        error="" if status == "Submitted" else f"{status}: {why}",
        cost_usd=amount([course], "info.model_stats.instance_cost") or None,
        tokens_in=count(asked, f"{usage}.prompt_tokens"),
        tokens_cached=count(asked, f"{usage}.prompt_tokens_details.cached_tokens"),
        tokens_out=count(asked, f"{usage}.completion_tokens"),
        turns=count([course], "info.model_stats.api_calls"),
    )


AGENT = Agent(
    "mini",  # its only tool is a shell
    words("""mini -y --exit-immediately -c mini.yaml -c model.model_kwargs.max_retries=0
        -c agent.step_limit=30 -c {folder}/task.yaml -o {side}.traj.json {model}"""),
    read,
    install="uv tool install mini-swe-agent",
    flag="-m",
    stdin=os.devnull,
    env={
        "MSWEA_CONFIGURED": "true",
        "MSWEA_SILENT_STARTUP": "1",
        "MSWEA_COST_TRACKING": "ignore_errors",
        "MSWEA_MODEL_RETRY_STOP_AFTER_ATTEMPT": "1",
    },
    files={"task.yaml": '{"run": {"task": {json}}}'},
    dollars=True,
)
