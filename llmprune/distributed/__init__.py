"""Many processes at one run, by torch.distributed: started by torchrun or `accelerate launch`, on one machine or many.

team.py     what processes do together; alone, all of it is nothing
ranks.py    the same over a process group
launch.py   from the environment that torchrun sets to a team
ending.py   how all end as one: by an error that is told once, by a signal, or by the loss of a process
"""

from llmprune.distributed.launch import leave, rank_in_environment, team_from_environment, told_by_others
from llmprune.distributed.team import Team

__all__ = ["Team", "leave", "rank_in_environment", "team_from_environment", "told_by_others"]
