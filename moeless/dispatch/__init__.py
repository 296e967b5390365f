"""From the router's choice to the weighted sum: grouping tokens by worker, transports, retry, combine."""
