-- The same for the second store, on its own server.
WITH client AS (
    SELECT concat_ws('|', client_id, ref, (regexp_match(full_name, '^([^ ]*) '))[1], (regexp_match(full_name, '^[^ ]* (.*)$'))[1],
                     coalesce(email, '(none)'), trim_scale(balance * 100),
                     coalesce(array_to_json(labels)::text, '(none)'), settings, extract(epoch FROM joined)) AS row
      FROM sales.client
), purchase AS (
    SELECT concat_ws('|', purchase_id, client_id, state, extract(epoch FROM placed_at), concat(street, ', ', city), coalesce(note, '(none)')) AS row
      FROM sales.purchase
), item AS (
    SELECT concat_ws('|', purchase_id, position, article, amount, trim_scale(unit_price * 100),
                     coalesce(trim_scale(discount_percent / 100)::text, '(none)'), coalesce(attributes::text, '(none)')) AS row
      FROM sales.item
)
SELECT 'customers' AS what, count(*), sum(('x' || left(md5(row), 15))::bit(60)::bigint)::text AS hash FROM client
UNION ALL
SELECT 'orders', count(*), sum(('x' || left(md5(row), 15))::bit(60)::bigint)::text FROM purchase
UNION ALL
SELECT 'order lines', count(*), sum(('x' || left(md5(row), 15))::bit(60)::bigint)::text FROM item;
