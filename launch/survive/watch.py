"""One start, from its nodes' first word to the end of its last process: did it fail, and whose
failure came first?"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, Queue

from launch.nodes.link import Event, Link
from launch.survive.supervision import SupervisionConfig
from launch.survive.timeline import Timeline
from train.outcome import ExitCode
from train.watch.stall import read_explanation, read_last_words

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
WORD_SECONDS = 2.0  # between signs of life to the agents
END_SECONDS = 10.0  # that killed nodes get to report before their links are cut
# A rank's death breaks the others' collectives. Where they are seen to end first, the death itself
# is reported within this time.
CAUSE_SECONDS = 5.0
ABORTS = ("SIGTERM", "SIGABRT")  # how ranks end that only noticed another's death


@dataclass(slots=True)
class Failure:
    """Why a start ended before the run did."""

    reason: str
    hosts: list[str] = field(default_factory=list)  # at fault, as far as that is known
    is_final: bool = False  # another start would fail the same way
    may_be_echo: bool = False  # of another rank's death
    time: float = field(default_factory=time.time)  # when it was noticed, since 1970


class Watch:
    """Reads what the links of one start tell, and tells them that the launcher lives."""

    def __init__(
        self,
        links: list[Link],
        events: "Queue[Event]",
        rules: SupervisionConfig,
        timeline: Timeline,
        *,
        attempt: int,
        grace_seconds: float,  # that ranks get to save after they were asked to stop
        after: Failure | None = None,  # the failure that this start follows on
    ) -> None:
        self.links = links
        self.events = events
        self.rules = rules
        self.timeline = timeline
        self.attempt = attempt
        self.grace_seconds = grace_seconds
        self.after = after
        self._began = time.time()
        self._told = 0.0  # time.monotonic() of the last sign of life
        self._is_training = False
        self._deadline: float | None = None  # by which ranks that were asked to stop have saved

    def until_over(self, is_stopping: Callable[[], bool]) -> Failure | None:
        """Why a node or rank failed, as soon as that is known; None where all ended as agreed."""
        try:
            return self._until_over(is_stopping)
        finally:
            self._note_training()

    def _until_over(self, is_stopping: Callable[[], bool]) -> Failure | None:
        while True:
            if is_stopping() and self._deadline is None:
                self._deadline = time.monotonic() + self.grace_seconds
                log.warning("stopping: the ranks finish their step and save")
                self._told = 0.0
            if self._is_time_for_a_word():
                if self._deadline is not None:
                    self._say("stop")  # again and again: ranks that still started missed it
                self._say("alive")
            self._note_training()
            try:
                event = self.events.get(timeout=POLL_SECONDS)
            except Empty:
                failure = self._find_silence()
                if failure is not None:
                    return failure
                continue
            failure = self._judge(event)
            if failure is not None:
                return self._find_cause(failure)
            if all(link.is_over for link in self.links):
                return None

    def _is_time_for_a_word(self) -> bool:
        """Whether the agents should hear of the launcher now; asked once, it is taken as done."""
        is_time = time.monotonic() - self._told > WORD_SECONDS
        if is_time:
            self._told = time.monotonic()
        return is_time

    def _say(self, word: str) -> None:
        for link in self.links:
            link.say(word)

    def _find_silence(self) -> Failure | None:
        """What is known without an event: a lost node, a stall, a save that takes too long."""
        limit = self.rules.lost_after_seconds
        lost = [host for link in self.links for host in link.find_silent(limit)]
        if lost:
            return Failure(f"nothing was heard of {', '.join(lost)}", lost)
        if self._deadline is not None and time.monotonic() > self._deadline:
            return Failure(f"the ranks did not save within {self.grace_seconds:g} s")
        # Behind somebody else's launcher a rank that is stopped keeps the whole start from ending.
        stall = read_explanation(self.timeline.run_dir, attempt=self.attempt)
        return Failure(stall.summary) if stall is not None else None

    def _judge(self, event: Event) -> Failure | None:
        """What an event means for the start; None where it goes on."""
        values = event.values
        match event.name:
            case "swept":
                text = f"{event.host}: killed {values['processes']} processes of an earlier start"
                self.timeline.note("swept", text)
            case "alone":
                return Failure(f"{event.host} lost its link to the launcher", [event.host])
            case "closed" if not values["is_over"]:
                reason = f"the link to {event.host} broke (exit code {values['code']})"
                return Failure(reason, [event.host])
            case "ended":
                return _judge_end(event)
        return None

    def _find_cause(self, first: Failure) -> Failure:
        """The failure that the others followed from; the first one where none stands out."""
        deadline = time.monotonic() + CAUSE_SECONDS
        failure: Failure | None = first
        while failure is None or failure.may_be_echo:
            if self._is_time_for_a_word():
                self._say("alive")
            is_over = all(link.is_over for link in self.links)
            left = 0.0 if is_over else max(deadline - time.monotonic(), 0.0)
            try:
                failure = self._judge(self.events.get(timeout=min(left, POLL_SECONDS)))
            except Empty:
                if not left:
                    return first
        return failure

    def _note_training(self) -> None:
        """Once, when the start's first step has ended: for how long nothing was trained."""
        if self._is_training:
            return
        words = read_last_words(self.timeline.run_dir, rank=0)
        if words is not None and words.attempt == self.attempt and words.step > 0:
            self._is_training = True
            text = f"a step has ended, {words.time - self._began:.1f} s after the start"
            if self.after is not None:
                text += f", {words.time - self.after.time:.1f} s after the failure was noticed"
            self.timeline.note("training", text, attempt=self.attempt)


def end_all(links: list[Link], rules: SupervisionConfig) -> None:
    """No process of the start is left, as far as its nodes can be reached."""
    for link in links:
        link.say("kill")
    heard = [link for link in links if not link.find_silent(rules.lost_after_seconds)]
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline and any(link.process.poll() is None for link in heard):
        time.sleep(POLL_SECONDS)
    for link in links:
        link.end()


def _judge_end(event: Event) -> Failure | None:
    """A node's ranks have ended: a failure unless they ended as ranks do that agree on it."""
    code, number = event.values["code"], event.values["signal"]
    if code in (ExitCode.FINISHED, ExitCode.INTERRUPTED):
        return None
    where = f"on {event.host}" if event.host else "somewhere"
    what = f"was killed by {number}" if number else f"ended with code {code}"
    hosts = [event.host] if event.host else []
    may_be_echo = number in ABORTS if number else code != ExitCode.STALLED
    return Failure(f"a rank {where} {what}", hosts, may_be_echo=may_be_echo)
