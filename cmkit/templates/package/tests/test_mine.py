"""The laws of every cmkit KIND; add those of your own paper."""

from cmkit import testing

from cmkit_mine.mine import Mine


def test_the_manifest_keeps_the_laws():
    testing.check_manifest("cmkit_mine.manifest")


def test_mine_keeps_the_laws_of_its_kind():
    testing.check_KIND(Mine())
