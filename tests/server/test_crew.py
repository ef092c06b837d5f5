"""Threads beside the event loop: so many at once, in turn, and nothing is held of what was given up."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from policy_server.crew import Crew


class Parcel:
    """Something that may be large."""


def test_work_is_done_in_turn_by_so_many_at_once():
    begun, free = [], threading.Event()

    def work(number: int) -> int:
        begun.append(number)
        assert free.wait(10)
        return number

    async def main() -> list[int]:
        crew = Crew(2, "test")
        tasks = [asyncio.create_task(crew.do(work, number)) for number in range(5)]
        await asyncio.sleep(0.1)
        assert sorted(begun) == [0, 1]
        free.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == [0, 1, 2, 3, 4]
    assert sorted(begun) == [0, 1, 2, 3, 4]


def test_what_work_raises_is_for_whoever_waits_and_the_next_has_its_turn():
    async def main() -> str:
        crew = Crew(1, "test")
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await crew.do(lambda: 1 / 0)
        return await crew.do(lambda: threading.current_thread().name)

    assert asyncio.run(main()).startswith("test")


def test_work_that_is_given_up_before_its_turn_is_never_begun_and_holds_nothing():
    begun, free = [], threading.Event()

    def work(parcel: Parcel) -> None:
        begun.append(type(parcel))
        assert free.wait(10)

    async def main() -> None:
        crew, parcel = Crew(1, "test"), Parcel()
        given_up_later = asyncio.create_task(crew.do(work, Parcel()))
        given_up = asyncio.create_task(crew.do(work, parcel))
        await asyncio.sleep(0.1)
        held = weakref.ref(parcel)
        del parcel
        for task in (given_up, given_up_later):
            task.cancel()
        await asyncio.wait({given_up, given_up_later})
        del task, given_up
        assert held() is None, "only the one that has begun goes on"
        following = asyncio.create_task(crew.do(len, "next"))
        await asyncio.sleep(0.1)
        assert not following.done()
        free.set()
        assert await following == 4

    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()
    assert begun == [Parcel]
