"""The leader's commands, and what the other ranks execute of them."""

import rank_jobs


def test_a_follower_executes_the_commands_of_the_leader_until_it_stops_whatever_happens(ranks):
    commands = [(3, [1, -2]), (0, []), (7, list(range(510))), (7, list(range(511))), (1, list(range(3000)))]
    leader, follower = ranks(2).run(rank_jobs.commands_executed, 2, commands)
    assert leader == []
    assert follower == [*commands, (0, [])]
