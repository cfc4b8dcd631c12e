"""What an earlier life left: half of a window goes, a whole one is never lost (R107, C28)."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from sqlalchemy import insert

from hive.policy.windows import WindowState
from hive.storage.catalogue import Catalogue, Session, Window, opened
from hive.storage.sqlite import FILE
from hive.storage.tables import windows
from hive.windows.files import MANIFEST
from hive.windows.recovery import IMPORTED, recover
from tests.patience import awaited, short_directory
from tests.windows.making import Home, unheard, window

STATES = (WindowState.FREEZING, WindowState.FROZEN, WindowState.DELETING)


@asynccontextmanager
async def begun() -> AsyncIterator[tuple[Catalogue, Home]]:
    with short_directory() as home:
        async with opened(home) as catalogue:
            yield catalogue, Home(home)


async def frozen(catalogue: Catalogue, home: Home, one: Window) -> Window:
    """Whole, in both."""
    await catalogue.begin_window(one)
    manifest, _ = home.frozen(one)
    row = manifest.window()
    await catalogue.commit_window(row, keep_active=True)
    return replace(row, state=WindowState.FROZEN)


async def known(catalogue: Catalogue) -> list[Window]:
    return [one for state in STATES for one in await catalogue.windows(None, state=state)]


STEPS = ["row", "folder", "blocks", "manifest", "named", "committed", "deleting", "half deleted"]


@pytest.mark.parametrize("step", STEPS)
@awaited
async def test_a_freeze_or_a_deletion_that_was_cut_off_is_whole_or_gone(step: str) -> None:
    """R106, R107, C28: the steps of a freeze, and of a deletion, up to a kill."""
    at = STEPS.index(step)
    async with begun() as (catalogue, home):
        other = await frozen(catalogue, home, window(9))
        one = window()
        await catalogue.begin_window(one)
        if step == "folder":
            home.files.begin(one.id)
        elif at > 1:
            part, manifest, names = home.begun(one)
            if at > 2:
                home.files._write_manifest(part, manifest)
            if at > 3:
                home.files.finish(part, manifest)
            if at > 4:
                await catalogue.commit_window(manifest.window(), keep_active=True)
            if at > 5:
                await catalogue.begin_removal(one.id)
            if at > 6:
                (home.files.folder(one.id) / MANIFEST).unlink()
        told = await recover(catalogue, home.files)

        rows = await known(catalogue)
        if step == "committed":
            assert told == []
            assert {row.id for row in rows} == {one.id, other.id}
            assert home.files.folders() == {one.id, other.id}
        else:
            assert len(told) == 1
            wanted = "was being deleted" if at > 5 else "was not frozen whole"
            assert told[0] == f"window w0 {wanted}: removed"
            assert rows == [other]
            assert home.present() == {other.id}
            if at > 1:
                assert all((home.tier / n).stat().st_nlink == 1 for c in names for n in c)
        assert all(
            one.is_whole for one in home.files.health(home.files.manifest(other.id), unheard)
        )
        assert await recover(catalogue, home.files) == []


@awaited
async def test_a_folder_of_nobody_is_left_as_it_is() -> None:
    """It may be somebody's: a catalogue from a backup does not know it."""
    async with begun() as (catalogue, home):
        await catalogue.set_mark(IMPORTED)
        await frozen(catalogue, home, window(9))
        home.frozen(window())
        for _ in range(2):
            assert await recover(catalogue, home.files) == [
                f"the folder {window().id} belongs to no window: left as it is"
            ]
        assert len(home.files.folders()) == 2
        assert len(await known(catalogue)) == 1


@awaited
async def test_a_start_that_fails_between_the_catalogue_and_its_windows_loses_none() -> None:
    """Only the last step of a recovery says that it was done."""
    with short_directory() as directory:
        async with opened(directory):
            pass  # made, and hive was killed then
        home = Home(directory)
        home.frozen(window())
        async with opened(directory) as catalogue:
            assert await recover(catalogue, home.files) == [
                "window w0 was had again by its manifest"
            ]
            assert [one.id for one in await known(catalogue)] == [window().id]
        async with opened(directory) as catalogue:
            assert await catalogue.has_mark(IMPORTED)


@awaited
async def test_what_could_not_be_read_is_had_again_at_a_later_start() -> None:
    """The disk may give it another time; the others are there at once."""
    with short_directory() as directory:
        home = Home(directory)
        for number in range(3):
            home.frozen(window(number))
        manifest = home.files.folder(window(1).id) / MANIFEST
        manifest.rename(manifest.with_name("kept"))
        manifest.mkdir()  # it cannot be read as long as it is one
        async with opened(directory) as catalogue:
            told = await recover(catalogue, home.files)
            assert any("cannot be had again now" in line for line in told)
            assert [one.name for one in await known(catalogue)] == ["w2", "w0"]
        manifest.rmdir()
        manifest.with_name("kept").rename(manifest)
        async with opened(directory) as catalogue:
            assert "window w1 was had again by its manifest" in await recover(catalogue, home.files)
            assert len(await known(catalogue)) == 3


@awaited
async def test_where_there_are_sessions_the_catalogue_was_not_lost() -> None:
    async with begun() as (catalogue, home):
        await catalogue.set_mark(IMPORTED)
        await catalogue.add_session(Session("s", "ada", "m", "salt", 1.0, 1.0))
        home.frozen(window())
        assert "belongs to no window" in (await recover(catalogue, home.files))[0]
        assert await known(catalogue) == []


@awaited
async def test_a_folder_that_was_not_finished_goes() -> None:
    async with begun() as (catalogue, home):
        whole = await frozen(catalogue, home, window(9))
        part, _, names = home.begun(window())
        assert await recover(catalogue, home.files) == [
            f"the folder {part.name} was not finished: removed"
        ]
        assert home.present() == {whole.id}
        assert (home.tier / names[0][0]).stat().st_nlink == 1


@awaited
async def test_a_window_that_lost_its_folder_is_told_at_every_start_and_stays() -> None:
    """C6: nobody pretends that it could be thawed, and nothing is thrown away."""
    async with begun() as (catalogue, home):
        one = await frozen(catalogue, home, window())
        shutil.rmtree(home.files.folder(one.id))
        for _ in range(2):
            assert await recover(catalogue, home.files) == [
                "window w0 has lost its folder: it cannot be thawed"
            ]
        assert await known(catalogue) == [one]


@awaited
async def test_windows_are_had_again_when_the_catalogue_was_lost() -> None:
    """R107: a broken database is set aside; manifests say everything."""
    with short_directory() as place:
        home = Home(place)
        async with opened(place) as catalogue:
            one = await frozen(
                catalogue, home, window(1, tags=("a", "b"), description="häng an 😀")
            )
            clone = await frozen(catalogue, home, window(2, parent_id=one.id, owner="bob"))
            home.frozen(window(3))
            (home.files.folder(window(3).id) / MANIFEST).write_bytes(b"{}")
            home.frozen(window(4, name="w1"))  # taken, by ada's other one
            home.begun(window(5))
        Path(place / FILE).write_bytes(b"this is no database" * 1000)
        async with opened(place) as catalogue:
            assert catalogue.set_aside is not None
            told = await recover(catalogue, home.files)
            assert told == [
                "window w1 was had again by its manifest",
                "window w2 was had again by its manifest",
                (
                    f"the folder {window(3).id} cannot be had again: The window's manifest cannot "
                    "be understood."
                ),
                f"the folder {window(4).id} has a window of a name that is taken: left as it is",
                f"the folder {window(5).id}.part was not finished: removed",
            ]
            assert sorted(await known(catalogue), key=lambda row: row.id) == [one, clone]
            assert await catalogue.lineage(one) == ([], ["w2"])
            assert len(home.files.folders()) == 4
            assert len(await recover(catalogue, home.files)) == 2  # of those that were left


@awaited
async def test_of_more_than_a_page_none_is_forgotten() -> None:
    """A page is a thousand windows."""
    async with begun() as (catalogue, home):
        home.files.directory.mkdir()
        many = 1001
        for at in range(many):
            home.files.folder(window(at).id).mkdir()
        rows = [{**asdict(window(at)), "state": "FROZEN", "tags": []} for at in range(many)]
        async with catalogue._engine.begin() as connection:
            await connection.execute(insert(windows), rows)
        assert await recover(catalogue, home.files) == []


@awaited
async def test_where_nothing_was_ever_frozen_there_is_nothing_to_do() -> None:
    async with begun() as (catalogue, home):
        assert await recover(catalogue, home.files) == []
        assert not home.files.directory.exists()


@awaited
async def test_however_many_were_cut_off_all_of_them_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """R107, C28: more than a page, of which some cannot be removed, and stay in the way of none."""
    monkeypatch.setattr("hive.storage.catalogue.MOST_PAGE", 3)
    async with begun() as (catalogue, home):
        await frozen(catalogue, home, window(99))
        for number in range(14):
            await catalogue.begin_window(window(number))
            home.files.begin(window(number).id)
        stubborn = [window(number).id for number in (1, 2, 3, 8)]
        for one in stubborn:
            folder = home.files.directory / one  # what is no directory does not take its name
            folder.write_text("in the way")
        told = await recover(catalogue, home.files)

        rows = await catalogue.windows(None, state=WindowState.FREEZING, most=100)
        gone = [line for line in told if line.endswith("was not frozen whole: removed")]
        assert len(gone) == 10
        assert {row.id for row in rows} == set(stubborn)
        assert not any("lost its folder" in line for line in told)
