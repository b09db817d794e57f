"""One module per command of `im-lightning`; heavy imports stay inside the functions."""

from im_lightning._utils.command_line import comma_list as comma_list
