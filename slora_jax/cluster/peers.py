# SPDX-License-Identifier: Apache-2.0
"""The processes of one engine, and what they must do alike, or not at all.

Their programs meet in collectives. If one refuses an option, or has another one, the others must
hear of it before the first of these: else they wait for each other for ever.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress

import msgspec

from slora_jax.cluster.channel import Channel, ClusterError

_MOST_BYTES = 1 << 16  # of what one process says
_MOST_ERROR = 2000  # characters of an error


class Word(msgspec.Struct, frozen=True):
    """What a process says of itself: facts by name, or why it can't go on."""

    facts: dict[str, str] = {}
    refusal: str | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode_word = msgspec.msgpack.Decoder(Word).decode
_decode_words = msgspec.msgpack.Decoder(list[Word]).decode


class Peers:
    """The other processes of this one's cluster, all of which know its secret.

    Args:
        process_id: of this process.
        num_processes: of all.
        channels: by process id: process 0's to all others, another one's to process 0.
    """

    def __init__(self, process_id: int, num_processes: int, channels: Mapping[int, Channel]):
        self.process_id = process_id
        self.num_processes = num_processes
        self.channels = channels

    def together[T](self, act: Callable[[], T], facts: Callable[[T], Mapping[str, str]]) -> T:
        """Does something that every process does; the same happens on all of them.

        Args:
            act: what is done.
            facts: what all must agree on, by name, from its result.

        Raises:
            ValueError: another process could not do it, or is gone, or they don't agree; all of
                them raise then.
            ClusterError: process 0 is gone.
        """
        if self.num_processes == 1:
            return act()
        try:
            result = act()
            said = dict(facts(result))
        except Exception as error:
            self._refuse(f"{type(error).__name__}: {error}"[:_MOST_ERROR])
            raise
        for process, theirs in enumerate(self.exchange(said)):
            for name, value in said.items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"{name} is {value} in process {self.process_id} of the engine and "
                        f"{theirs.get(name)} in process {process}: give all processes the same"
                    )
        return result

    def exchange(self, facts: Mapping[str, str]) -> list[dict[str, str]]:
        """What every process says, in their order; each calls this as often as the others.

        Raises:
            ValueError: another process refuses to go on, or is gone.
            ClusterError: process 0 is gone.
        """
        if self.num_processes == 1:
            return [dict(facts)]
        own = Word(dict(facts))
        if self.process_id == 0:
            words = self._share(own)
        else:
            channel = self.channels[0]
            channel.send(_encode(own))
            words = understand(_decode_words, channel.receive(_MOST_BYTES * self.num_processes))
        for word in words:
            if word.refusal is not None:
                raise ValueError(word.refusal)
        return [word.facts for word in words]

    def close(self) -> None:
        """Ends all connections."""
        for channel in self.channels.values():
            channel.close()

    def lost(self) -> str | None:
        """Why the cluster can't go on: what a process said before it ended its connection.

        It may be called while this process waits for something else; None: all are there.
        """
        for process, channel in self.channels.items():
            if channel.hung_up():
                return self._hear(process).refusal or f"process {process} of the engine is gone"
        return None

    def _refuse(self, why: str) -> None:
        """Says why this process does not go on; it raises the reason itself."""
        word = Word(refusal=f"process {self.process_id} of the engine refuses: {why}")
        if self.process_id == 0:
            self._share(word)
        else:
            with suppress(ClusterError):
                self.channels[0].send(_encode(word))

    def _share(self, own: Word) -> list[Word]:
        """Process 0 hears all, and then tells all: nobody ends before all have heard why."""
        words = [own, *map(self._hear, self.channels)]
        for channel in self.channels.values():
            with suppress(ClusterError):  # its word says so
                channel.send(_encode(words))
        return words

    def _hear(self, process: int) -> Word:
        try:
            return understand(_decode_word, self.channels[process].receive(_MOST_BYTES))
        except ClusterError as error:
            return Word(refusal=f"process {process} of the engine is lost: {error}")


ALONE = Peers(0, 1, {})
"""An engine of one process."""


def understand[T](decode: Callable[[bytes], T], data: bytes) -> T:
    """Decodes what a process said.

    Raises:
        ClusterError: it is no such message.
    """
    try:
        return decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ClusterError(f"it said what is not understood: {error}") from error
