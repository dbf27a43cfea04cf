"""The HTTP interface of the endpoint: server, routes, schemas, errors, keys, limits."""
