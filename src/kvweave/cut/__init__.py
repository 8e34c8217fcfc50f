"""From a padded batch to views of a layer, and from plans back to what is stored."""
