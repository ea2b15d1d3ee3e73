-- One row for each table of the first store: how many rows, and a hash that does not depend on their order. Written by hand beside
-- compare-second.sql, apart from the mapping: both spell out one neutral form of a row.
WITH client AS (
    SELECT concat_ws('|', customer_id, external_id, first_name, last_name, coalesce(email, '(none)'), balance_cents,
                     coalesce(array_to_json(tags)::text, '(none)'), preferences, extract(epoch FROM created_at)) AS row
      FROM :customer
), purchase AS (
    SELECT concat_ws('|', order_id, customer_id, status, extract(epoch FROM placed_at), ship_to, coalesce(note, '(none)')) AS row
      FROM :orders
), item AS (
    SELECT concat_ws('|', order_id, line_no, sku, quantity, unit_price_cents, coalesce(trim_scale(discount)::text, '(none)'),
                     coalesce(attributes::text, '(none)')) AS row
      FROM :order_line
)
SELECT 'customers' AS what, count(*), sum(('x' || left(md5(row), 15))::bit(60)::bigint)::text AS hash FROM client
UNION ALL
SELECT 'orders', count(*), sum(('x' || left(md5(row), 15))::bit(60)::bigint)::text FROM purchase
UNION ALL
SELECT 'order lines', count(*), sum(('x' || left(md5(row), 15))::bit(60)::bigint)::text FROM item;
