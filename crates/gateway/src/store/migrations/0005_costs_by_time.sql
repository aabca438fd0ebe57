-- `costs` finds its days by `at`: each index is a page more to write for every request.
DROP INDEX requests_day;
